"""A recipe's rows where episodes are played: chats, which an environment may have to begin."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_cli.data.rows import EMPTY_PROMPT, recipe_rows
from grpo_cli.errors import UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import Recipe

CHAT = [{"role": "user", "content": "Hi"}]


def recipe(**changes: Any) -> Recipe:
    values = {
        "model": {"name": "m"},
        "data": {"name": "in-memory"},
        "rewards": ["my:score"],
        "episode": {"environment": "my:Game"},
        "train": {"output_dir": "run", "max_steps": 2, "prompts_per_step": 3},
    }
    return load_recipe(values | changes)


def test_without_data_there_is_an_empty_message_for_each_prompt_of_a_step() -> None:
    rows, eval_rows = recipe_rows(recipe(data={}))
    assert [rows.content(row) for row in range(len(rows))] == [EMPTY_PROMPT] * 3
    assert rows.columns == []
    assert rows.conversational
    assert eval_rows is None


def test_a_system_prompt_stands_before_what_the_environment_says() -> None:
    rows, _ = recipe_rows(recipe(data={"system_prompt": "Be brief."}))
    assert rows.content(0) == [{"role": "system", "content": "Be brief."}, *EMPTY_PROMPT]


def test_rows_may_say_only_which_environment_they_are_for() -> None:
    given = recipe(
        episode={"environment": {"a": "my:A", "b": "my:B"}},
        data={"name": "in-memory", "eval": {"name": "in-memory"}},
    )
    rows, eval_rows = recipe_rows(given, [{"environment": "a"}, {"environment": "b"}], [{"environment": "b"}])
    assert [(rows.content(row), rows.row_columns(row)) for row in range(2)] == [
        (EMPTY_PROMPT, {"environment": "a"}),
        (EMPTY_PROMPT, {"environment": "b"}),
    ]
    assert eval_rows is not None
    assert (eval_rows.content(0), eval_rows.row_columns(0)) == (EMPTY_PROMPT, {"environment": "b"})


def test_prompts_that_there_are_stay() -> None:
    rows, _ = recipe_rows(recipe(), [{"prompt": CHAT, "level": 1}])
    assert (rows.content(0), rows.row_columns(0)) == (CHAT, {"level": 1})


def test_rows_without_prompts_are_refused_where_no_environment_makes_them() -> None:
    with pytest.raises(UserError, match="there is no column 'prompt'"):
        recipe_rows(recipe(episode={"tools": ["my:tool"]}), [{"level": 1}])


@pytest.mark.parametrize("episode", [{"tools": ["my:tool"]}, {"environment": "my:Game"}])
def test_prompts_that_are_texts_are_refused_in_episodes(episode: dict[str, Any]) -> None:
    texts = [{"prompt": "Hi"}]
    message = "^data: the prompts are texts, and tools and environments need chats; set data.system_prompt, or"
    with pytest.raises(UserError, match=message):
        recipe_rows(recipe(episode=episode), texts)
    held_out = {"name": "in-memory", "eval": {"name": "in-memory"}}
    with pytest.raises(UserError, match=r"^data\.eval: the prompts are texts"):
        recipe_rows(recipe(episode=episode, data=held_out), [{"prompt": CHAT}], texts)
    rows, _ = recipe_rows(recipe(episode=episode, data={"name": "in-memory", "system_prompt": "Be kind."}), texts)
    assert rows.conversational
