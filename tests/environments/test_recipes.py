"""The recipes of what ships fit what they name: data, tools, environments and rewards."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_cli.data.rows import recipe_rows
from grpo_cli.episode.environments import (
    check_reset,
    check_scored,
    environment_rewards,
    resolve_environments,
    resolve_tools,
)
from grpo_cli.recipe.episode import EpisodeConfig
from grpo_cli.recipe.load import load_recipe
from grpo_cli.reward.registry import check_columns, resolve_rewards

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("name", "tools", "rewards"),
    [
        ("calculator", ["calculate"], ["boxed_answer"]),
        ("python_tool", ["run_python"], ["boxed_answer"]),
        ("guessing_game", [], ["GuessingGame"]),
        ("reasoning_gym", [], ["score"]),
    ],
)
def test_a_recipe_and_what_it_names_fit_together(name: str, tools: list[str], rewards: list[str]) -> None:
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    rows, eval_rows = recipe_rows(recipe)
    episode = recipe.episode or EpisodeConfig()
    own = resolve_tools(episode.tools)
    kinds = resolve_environments(episode, own)
    functions = [*resolve_rewards(recipe.rewards), *environment_rewards(kinds)]
    check_scored(kinds, functions)
    for part in filter(None, (rows, eval_rows)):
        assert part.conversational
        check_reset(kinds, part.columns, part.setting)
        check_columns(functions, part.columns, part.setting, has_environments=bool(kinds))
    assert [tool.name for tool in own] == tools
    assert [function.name for function in functions] == rewards
    if eval_rows is not None:
        seen = {str(rows.content(row)) for row in range(len(rows))}
        held_out = [str(eval_rows.content(row)) for row in range(len(eval_rows))]
        assert not seen.intersection(held_out)
