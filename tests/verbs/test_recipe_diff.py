from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_cli.cli import app
from grpo_cli.recipe.load import dump_recipe, load_recipe
from grpo_cli.recipe.raw import RecipeError
from tests.recipe.recipes import PLAIN


def diff(before: Path, after: Path) -> str:
    result = CliRunner().invoke(app, ["recipe", "diff", str(before), str(after)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(PLAIN)
    return path


def test_a_recipe_is_compared_with_that_of_a_run(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(recipe, ["loss.epsilon=0.1", "rewards.0.weight=2"])))
    assert diff(recipe, run) == "rewards.0.weight: 1.0 -> 2.0\nloss.epsilon: 0.2 -> 0.1\n"
    assert diff(run, recipe) == "rewards.0.weight: 2.0 -> 1.0\nloss.epsilon: 0.1 -> 0.2\n"


def test_a_run_of_a_recipe_does_what_the_recipe_would(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "resolved.yaml"
    other.write_text(dump_recipe(load_recipe(recipe)))
    assert diff(recipe, other) == f"no difference: {recipe} and {other} set the same values\n"


def test_a_folder_without_a_recipe_and_a_wrong_recipe_are_errors(recipe: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RecipeError, match=r"empty/recipe\.yaml: cannot read the recipe: No such file"):
        diff(recipe, empty)
    recipe.write_text(PLAIN + "loss: {epsilom: 1}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:10: loss\.epsilom is not a setting"):
        diff(recipe, recipe)
