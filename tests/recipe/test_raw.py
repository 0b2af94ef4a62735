"""YAML as its readers mean it."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.raw import RecipeError
from tests.recipe.recipes import PLAIN, errors, load, plain


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("3.0e-5", 3e-5), ("1.e-6", 1e-6), (".5", 0.5), ("0.5", 0.5), ("1e+1", 10.0)],
)
def test_a_number_with_an_exponent_is_a_number(file: Path, text: str, number: float) -> None:
    assert load(file, PLAIN + f"optim: {{learning_rate: {text}}}").optim.learning_rate == number


def test_a_whole_number_will_do_where_a_number_is_wanted(file: Path) -> None:
    assert load(file, PLAIN + "loss: {beta: 1}").loss.beta == 1


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "No", "Off", "y", "N"])
def test_words_that_old_yaml_takes_for_booleans_stay_words(file: Path, word: str) -> None:
    assert load(file, PLAIN.replace("name: m", f"name: {word}")).model.name == word


@pytest.mark.parametrize("word", ["true", "True", "TRUE"])
def test_true_is_true(file: Path, word: str) -> None:
    assert load(file, PLAIN.replace("name: m", f"name: m\n  trust_remote_code: {word}")).model.trust_remote_code


@pytest.mark.parametrize(
    "text", ["2024-05-01", "2024-99-99", "1:30", "12:30:45", "0o17", "010", "1.2.3", "12e34x"]
)
def test_dates_times_and_revisions_stay_text(file: Path, text: str) -> None:
    assert load(file, PLAIN.replace("name: m", f"name: m\n  revision: {text}")).model.revision == text


@pytest.mark.parametrize(("text", "number"), [("1_000", 1000), ("0x10", 16), ("+5", 5), ("0b11", 3)])
def test_whole_numbers_may_be_written_in_yaml_s_other_ways(file: Path, text: str, number: int) -> None:
    assert load(file, PLAIN + f"  seed: {text}").train.seed == number


def test_null_is_empty(file: Path) -> None:
    recipe = load(file, PLAIN + "  eval_every: null\n  epochs: ~\n  max_tokens_per_microbatch:")
    assert (recipe.train.eval_every, recipe.train.epochs, recipe.train.max_tokens_per_microbatch) == (
        None,
        None,
        None,
    )


def test_anchors_merge(file: Path) -> None:
    text = PLAIN.replace("  name: d.jsonl", "  name: d.jsonl\n  columns: &renames {q: prompt}")
    recipe = load(
        file, text.replace("rewards:", "  eval: {name: e.jsonl, columns: {<<: *renames, a: gold}}\nrewards:")
    )
    assert recipe.data.eval is not None
    assert recipe.data.eval.columns == {"q": "prompt", "a": "gold"}


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode())
    assert load_recipe(file) == load_recipe(plain())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN + "loss: {}\nloss: {}\n", "recipe.yaml:11: loss is set twice (first at recipe.yaml:10)"),
        (PLAIN + "  max_steps: 3\n", "recipe.yaml:10: train.max_steps is set twice (first at recipe.yaml:9)"),
        (PLAIN + "loss: {beta: 1, beta: 1}\n", "recipe.yaml:10: loss.beta is set twice (first at recipe.yaml:10)"),
        (PLAIN.replace("  name: m", "\tname: m"), "recipe.yaml:2: not valid YAML: found character '\\t'"),
        (PLAIN + "loss: [1\n", "recipe.yaml:11: not valid YAML: "),
        (PLAIN + "loss: \x07\n", "recipe.yaml:10: not valid YAML: the character '\\x07'"),
        (PLAIN + "---\nloss: {}\n", "recipe.yaml:10: not valid YAML: but found another document"),
        (PLAIN + "? [a, b]\n: c\n", "recipe.yaml:10: not valid YAML: found unhashable key"),
        (PLAIN + "loss: *nowhere\n", "recipe.yaml:10: not valid YAML: found undefined alias"),
        (PLAIN + "loss: !!int x\n", "recipe.yaml:10: not valid YAML: 'x' is not a value of int"),
        (
            PLAIN + "loss: !!timestamp x\n",
            "recipe.yaml:10: not valid YAML: could not determine a constructor for the ",
        ),
        (PLAIN + f"loss: {'9' * 5000}\n", "recipe.yaml:10: not valid YAML: '9999"),
        (PLAIN + "loss: !!python/name:os.system\n", "recipe.yaml:10: not valid YAML: could not determine"),
        (PLAIN + "loss: &a [*a]\n", "recipe.yaml:10: not valid YAML: the anchor &a contains itself"),
        ("", "recipe.yaml: a recipe is a mapping of sections"),
        ("# nothing yet\n", "recipe.yaml: a recipe is a mapping of sections"),
        ("- model\n", "recipe.yaml: a recipe is a mapping of sections"),
        (b"\xff\xfe", "recipe.yaml: cannot read the recipe: it is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line_with_its_place(file: Path, text: str | bytes, message: str) -> None:
    (line,) = errors(file, text)
    assert line.startswith(message)


def test_a_missing_recipe_and_a_folder_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot read the recipe: No such file or directory"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe: Is a directory"):
        load_recipe(tmp_path)
