"""Errors on the screen name the line of the documentation that explains the key, and the line is the right one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from grpo_cli import cli
from grpo_cli.errors import UserError
from grpo_cli.recipe import links
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.messages import all_keys
from grpo_cli.recipe.raw import KeyPath, RecipeError, dotted, key_path
from grpo_cli.recipe.reference import line_of
from tests.recipe.recipes import PLAIN

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines()


def line(key: str) -> str:
    number = line_of(tuple(int(part) if part.isdigit() else part for part in key.split(".")))
    return "" if number is None else PAGE[number - 1]


def on_screen(recipe: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that `grpo check` ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["grpo", "check", str(recipe), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path to write a recipe to, seen from the repository."""
    monkeypatch.chdir(ROOT)
    return tmp_path / "my.yaml"


@pytest.mark.parametrize("key", all_keys(), ids=dotted)
def test_every_key_has_a_line_that_is_about_it(key: KeyPath) -> None:
    shown = line(dotted(key))
    title = dotted(tuple("N" if part == 0 else part for part in key))
    assert shown.startswith(f"| `{key[-1]}` | ") or shown in (f"## `{title}`", f"## `{title}.N`")


def test_two_sections_with_the_same_key_have_a_line_each() -> None:
    assert line_of(("data", "name")) != line_of(("data", "eval", "name"))
    for key, section in ((("data", "limit"), "## `data`"), (("data", "eval", "limit"), "## `data.eval`")):
        number = line_of(key)
        assert number is not None
        assert next(text for text in reversed(PAGE[:number]) if text.startswith("## ")) == section


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("rewards.3.weight", "| `weight` | number |"),
        ("rewards.3", "## `rewards.N`"),
        ("generation.vllm.max_model_len", "| `vllm` |"),
        ("episode.environment.chess.params", "## `episode.environment`"),
        ("nothing", ""),
    ],
)
def test_what_has_no_line_of_its_own_is_explained_with_what_it_is_in(key: str, shown: str) -> None:
    assert line(key).startswith(shown)


def test_each_error_about_a_key_ends_with_its_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(PLAIN + "loss:\n  epsilom: 0.1\n  zzz: 1\n  beta: x\noptim: {params: {x: 1}}\nmodle: 1\n")
    where = {key: f"(docs/recipe.md:{line_of(key)})" for key in all_keys()}
    unlinked, *others = sorted(
        on_screen(recipe, "--set", "train.seed=-1", capsys=capsys), key=lambda text: text.endswith(")")
    )
    assert "loss.zzz is not a setting; loss has type, beta, " in unlinked, "it names no key that would help"
    assert others == [
        f"{recipe}:11: loss.epsilom is not a setting; did you mean loss.epsilon? {where['loss', 'epsilon']}",
        f"{recipe}:13: loss.beta must be a number, not the string 'x' {where['loss', 'beta']}",
        f"{recipe}:14: optim.params is for a factory; adamw takes betas and weight_decay "
        f"{where['optim', 'params']}",
        f"{recipe}:15: modle is not a setting; did you mean model? {where['model',]}",
        f"--set train.seed=-1: train.seed is -1; it should be greater than or equal to 0 {where['train', 'seed']}",
    ]


def test_errors_that_are_about_no_key_have_no_link(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("model: [\n", "1: 2\n", "- a\n"):
        recipe.write_text(text)
        (shown,) = on_screen(recipe, capsys=capsys)
        assert "recipe.md" not in shown


def test_what_a_recipe_names_and_is_not_there_is_explained_too(
    recipe: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(PLAIN)
    named = f"model.name={tiny_model_dir}", "--set", "data.name=nothing.jsonl"
    (shown,) = on_screen(recipe, "--set", *named, capsys=capsys)
    assert shown.startswith("data.name: no such file: nothing.jsonl")
    assert shown.endswith(f" (docs/recipe.md:{line_of(('data', 'name'))})")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("rewards.1: there is no module 'mine'\nand more", "rewards.0"),
        ("data: row 1 is text", "data"),
        ("loss.type: f: 1", "loss.type"),
        ("nothing.at.all: 1", None),
        ("reward data: no", None),
        ("model tiny: no", None),
        ("", None),
    ],
)
def test_only_a_line_that_begins_with_a_key_has_a_link(text: str, key: str | None) -> None:
    first, *others = links.with_links(UserError(text)).split("\n")
    page = links.reference_file()
    link = "" if key is None else f" ({page}:{line_of(key_path(key))})"
    assert [first, *others] == [text.split("\n")[0] + link, *text.split("\n")[1:]]


def test_the_text_of_an_error_does_not_depend_on_where_the_page_is(recipe: Path) -> None:
    recipe.write_text(PLAIN + "loss: {beta: x}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert str(caught.value) == f"{recipe}:10: loss.beta must be a number, not the string 'x'"


def test_of_more_problems_than_are_shown_each_that_is_has_its_link(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(PLAIN.replace("  - my:score\n", '  - {path: "my:score", wieght: 2}\n' * 500))
    *shown, last = on_screen(recipe, capsys=capsys)
    assert last == f"{recipe}: 400 further problems"
    assert len(shown) == 100
    assert all(text.endswith(f".weight? (docs/recipe.md:{line_of(('rewards', 0, 'weight'))})") for text in shown)


def test_the_page_is_found_where_grpo_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "grpo_cli"
    page = package / "docs" / "recipe.md"
    monkeypatch.setattr(links, "PACKAGE", package)
    assert links.reference_file() is None
    error = RecipeError("my.yaml:1: loss.beta is wrong", [("loss", "beta")])
    assert links.with_links(error) == "my.yaml:1: loss.beta is wrong"
    page.parent.mkdir(parents=True)
    page.write_text("")
    assert links.reference_file() == page, "absolute, if not below the current folder"
    monkeypatch.chdir(tmp_path)
    assert links.reference_file() == Path("site/grpo_cli/docs/recipe.md")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["sources"] == {"docs": "grpo_cli/docs"}, "an installed grpo has the page there"
    assert "docs" in wheel["only-include"]


def test_the_lines_in_the_readme_are_those_of_the_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(
        r"^my\.yaml:\d+: .*?\b(loss\.epsilon|train\.\w+)\b.* \(docs/recipe\.md:(\d+)\)$", text, re.M
    )
    assert len(shown) == 2
    for key, number in shown:
        assert f"`{key.rpartition('.')[2]}`" in PAGE[int(number) - 1], (
            f"{key} is on line {line_of(tuple(key.split('.')))}"
        )
