"""What would keep a reader busy, fill its memory or make it stumble ends in one line with its place."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_cli.recipe.load import MAX_PROBLEMS, dump_recipe, load_recipe
from grpo_cli.recipe.raw import MAX_BYTES, MAX_LEVELS, MAX_VALUES, RecipeError
from tests.recipe.recipes import PLAIN, errors, load, plain

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
)
"""A billion values in nine lines."""

LONG_WORD = f"long: &long {'x' * 50_000}\nmany: [{', '.join(['*long'] * 9000)}]\n"
"""Half a gigabyte of characters in 100 kB."""

MERGES = "m0: &m0 {a: 1, b: 2}\n" + "".join(
    f"m{level}: &m{level} {{<<: [{', '.join([f'*m{level - 1}'] * 10)}]}}\n" for level in range(1, 9)
)

CHAIN = "c0: &c0 [x]\n" + "".join(f"c{level}: &c{level} [*c{level - 1}]\n" for level in range(1, 100))

TOO_MUCH = {
    "nested anchors": (LAUGHS, "recipe.yaml:5: not valid YAML: more than 20000 values (an alias counts as what"),
    "one long word, many times": (LONG_WORD, "recipe.yaml:2: not valid YAML: more than 524288 characters"),
    "merges of merges": (MERGES, "recipe.yaml:5: not valid YAML: more than 20000 values"),
    "a chain of anchors": (CHAIN, "recipe.yaml:49: not valid YAML: more than 50 lists and mappings inside"),
    "open brackets": ("a: " + "[" * 100_000, "recipe.yaml:1: not valid YAML: more than 50 lists and mappings"),
    "open braces": ("a: " + "{x: " * 50_000, "recipe.yaml:1: not valid YAML: more than 50 lists and mappings"),
    "indentation": ("".join(f"{' ' * n}a:\n" for n in range(600)), "recipe.yaml:50: not valid YAML: more than 50"),
    "keys that are keys": ("? " * 100_000, "recipe.yaml:1: not valid YAML: more than 50 lists and mappings"),
    "a list of everything": ("a: [" + "x," * 100_000, "recipe.yaml:1: not valid YAML: more than 20000 values"),
    "a large file": ("# " + "x" * MAX_BYTES, "recipe.yaml: cannot read the recipe: it has more than 512 KiB"),
    "ten thousand wrong keys": (
        PLAIN + "".join(f"lerning_rat{n}: 1\n" for n in range(4500)),
        "recipe.yaml:10: lerning_rat0 is not a setting; did you mean optim.learning_rate?",
    ),
    "a hexadecimal number": (PLAIN + "loss: 0x" + "f" * 200_000, "recipe.yaml:10: not valid YAML: '0xffff"),
    "a sexagesimal number": (
        PLAIN + "loss: !!int " + "1:" * 100_000 + "1",
        "recipe.yaml:10: not valid YAML: '1:1:1",
    ),
}


def test_a_recipe_that_would_fill_memory_or_take_minutes_is_refused_at_once(tmp_path: Path) -> None:
    """In a process with a gigabyte of memory and, for all of them together, a minute of computing."""
    for name, (text, _) in TOO_MUCH.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(text)
    program = """
import os, sys
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.raw import RecipeError
for name in sorted(os.listdir()):
    os.chdir(name)
    try:
        load_recipe("recipe.yaml")
    except RecipeError as error:
        print(str(error).splitlines()[0])
    os.chdir("..")
"""
    limits = {resource.RLIMIT_AS: 2**30, resource.RLIMIT_CPU: 60}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: [resource.setrlimit(kind, (most, most)) for kind, most in limits.items()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = dict(zip(sorted(TOO_MUCH), done.stdout.splitlines(), strict=True))
    for name, (_, message) in TOO_MUCH.items():
        assert said[name].startswith(message), name


def test_a_recipe_may_come_close_to_every_bound(file: Path) -> None:
    words = ", ".join(["x"] * (MAX_VALUES - 100))
    nested = "[" * (MAX_LEVELS - 5) + "]" * (MAX_LEVELS - 5)
    text = PLAIN.replace("my:score", f"path: my:score\n    params: {{words: [{words}], nested: {nested}}}")
    text += f"# {'x' * (MAX_BYTES - len(text) - 2)}"
    recipe = load(file, text)
    assert len(recipe.rewards[0].params["words"]) == MAX_VALUES - 100


def test_of_many_problems_the_first_are_named_and_the_others_counted(file: Path) -> None:
    lines = errors(file, PLAIN + "".join(f"wrong{n}: 1\n" for n in range(MAX_PROBLEMS + 7)))
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[0].startswith("recipe.yaml:10: wrong0 is not a setting")
    assert lines[-1] == "recipe.yaml: 7 further problems"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('loss: "\\U00110000"\n', "recipe.yaml:10: not valid YAML: "),
        ('loss: "\\ud83d"\n', "recipe.yaml:10: not valid YAML: half of a surrogate pair is not a character"),
        ("loss: !!python/object/apply:os.system [ls]\n", "recipe.yaml:10: not valid YAML: could not determine a"),
        ("loss: !!binary aGk=\n", "recipe.yaml:10: not valid YAML: could not determine a constructor"),
        ("loss: !!set {a, b}\n", "recipe.yaml:10: not valid YAML: could not determine a constructor"),
        ("loss: !!omap [a: 1]\n", "recipe.yaml:10: not valid YAML: could not determine a constructor"),
        ("loss: !!str [a]\n", "recipe.yaml:10: not valid YAML: expected a scalar node, but found sequence"),
        ("loss: {<<: 3}\n", "recipe.yaml:10: not valid YAML: expected a mapping or list of mappings for merging"),
        ("loss: &a {<<: *a}\n", "recipe.yaml:10: not valid YAML: the anchor &a contains itself"),
        ("true: 1\n", "recipe.yaml:10: true is not a setting; keys are words"),
        ("optim: {params: {a: {1: 2}}}\n", "recipe.yaml:10: optim.params.a.1 is not a setting; keys are words"),
        ('"a\\nb\\e[31m": 1\n', "recipe.yaml:10: a\\nb\\x1b[31m is not a setting; a recipe has "),
        (
            f"loss: {{beta: {'x' * 5000}}}\n",
            f"recipe.yaml:10: loss.beta must be a number, not the string '{'x' * 99}",
        ),
        (
            f"logging: {{every: {10**50}}}\n",
            f"recipe.yaml:10: logging.every is {10**50}; it should have at most 63",
        ),
        (
            "generation: {temperature: 1e999}\n",
            "recipe.yaml:10: generation.temperature is inf; it should be a fin",
        ),
    ],
)
def test_what_yaml_has_and_a_recipe_has_not_is_one_line_with_its_place(
    file: Path, text: str, message: str
) -> None:
    (line,) = errors(file, PLAIN + text)
    assert line.startswith(message)
    assert len(line) < 1200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PLAIN.encode("utf-16"), "recipe.yaml: cannot read the recipe: it is not UTF-8 text"),
        (PLAIN.encode("utf-16-le"), "recipe.yaml:1: not valid YAML: the character '\\x00'"),
        (PLAIN.encode() + b"\0", "recipe.yaml:10: not valid YAML: the character '\\x00'"),
        (b"%YAML " + b"9" * 5000 + b".1\n---\n" + PLAIN.encode(), "recipe.yaml:1: not valid YAML: found a number"),
    ],
)
def test_bytes_that_are_no_text_are_named(file: Path, content: bytes, message: str) -> None:
    (line,) = errors(file, content)
    assert line.startswith(message)


def test_a_pipe_and_a_device_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(RecipeError, match="cannot read the recipe: it is a pipe or a device, not a file"):
            load_recipe(path)
    with pytest.raises(RecipeError, match="cannot read the recipe: embedded null byte"):
        load_recipe("a\0b.yaml")


def test_an_equals_sign_is_a_word(file: Path) -> None:
    assert load(file, PLAIN + "generation: {stop: [=]}").generation.stop == ["="]
    assert load(file, dump_recipe(load(file, PLAIN + "generation: {stop: [=]}"))).generation.stop == ["="]


def test_an_override_changes_one_of_the_places_that_an_anchor_stands_for(file: Path) -> None:
    text = PLAIN.replace("- my:score", "- {path: my:a, params: &p {n: 1}}\n  - {path: my:b, params: *p}")
    recipe = load(file, text, "rewards.0.params.n=2")
    assert [reward.params for reward in recipe.rewards] == [{"n": 2}, {"n": 1}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            f"{{a: &a [x, x], b: &b [{'*a, ' * 99}], c: &c [{'*b, ' * 99}]}}",
            "the value is not valid YAML: more than",
        ),
        ("[" * 1000, "the value is not valid YAML: more than 50 lists and mappings"),
        ("{a: 1, a: 2}", "a is set twice"),
        ("{1: 2}", "1 is not a setting; keys are words"),
        ("!!python/name:os.system", "the value is not valid YAML: could not determine a constructor"),
        ('"\\ud800"', "the value is not valid YAML: half of a surrogate pair"),
        ("\udcff", "the value is not valid YAML: the character"),
        ("0x" + "f" * 5000, "the value is not valid YAML: '0xfff"),
    ],
)
def test_the_value_of_an_override_has_the_same_bounds(value: str, message: str) -> None:
    override = f"optim.params={value}"
    with pytest.raises(RecipeError) as caught:
        load_recipe(plain(), [override])
    assert str(caught.value).startswith(f"--set {override}: {message}")


def test_the_path_of_an_override_is_no_deeper_than_a_recipe() -> None:
    with pytest.raises(RecipeError, match="60000 keys inside one another; no setting has that many"):
        load_recipe(plain(), [".".join(["a"] * 60_000) + "=1"])


@pytest.mark.parametrize("number", [10**400, -(10**5000)], ids=["large", "too large to print"])
def test_a_number_from_python_may_be_of_any_size(number: int) -> None:
    for values in (plain(loss={"beta": number}), plain(logging={"every": number}), plain(model={"name": number})):
        with pytest.raises(RecipeError, match=r"^recipe: (loss\.beta|logging\.every|model\.name) "):
            load_recipe(values)
