"""`grpo recipe diff`: what two recipes, or the recipes of two runs, would do differently. No torch."""

from __future__ import annotations

from pathlib import Path

from grpo_cli.recipe.differences import Difference, differences
from grpo_cli.recipe.load import load_recipe


def recipe_diff(before: Path, after: Path) -> list[Difference]:
    """The settings that differ once defaults are filled in.

    Args:
        before: a recipe, or the folder of a run, whose `recipe.yaml` is meant.
        after: the other.

    Raises:
        RecipeError: one of them cannot be read, or is not valid.
    """
    first, second = (load_recipe(path / "recipe.yaml" if path.is_dir() else path) for path in (before, after))
    return differences(first.model_dump(mode="json"), second.model_dump(mode="json"))
