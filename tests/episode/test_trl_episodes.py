"""Token for token TRL 1.16's: what its own trainer makes of a script is what ours makes of it.

`record_trl_episodes.py` wrote what TRL makes of it. Where ours differs, the play says why.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from grpo_cli.data.prompts import Prompt
from grpo_cli.episode.driver import Driver
from grpo_cli.episode.environments import environment_kind
from grpo_cli.episode.tools import tool_of
from grpo_cli.episode.world import World
from grpo_cli.recipe.episode import EpisodeConfig
from grpo_cli.rollout.engine import Completion
from tests.episode.chat import HERE, chat_tokenizer
from tests.episode.scripted import Scripted
from tests.episode.trl_episodes import QUESTION, TOOLS, Counter, Play, plays_of, setting_of, turn_text

RECORDED: dict[str, Any] = json.loads((HERE / "data" / "trl_episodes.json").read_text(encoding="utf-8"))
BY_NAME = {(entry["template"], entry["play"]): entry for entry in RECORDED["episodes"]}
EPISODES = [(template, play) for template in ("qwen2_5", "llama3_1") for play in plays_of(template)]
ALIKE = [(template, play) for template, play in EPISODES if play.differs is None]
OTHER = [(template, play) for template, play in EPISODES if play.differs is not None]


def named(episode: tuple[str, Play]) -> str:
    return f"{episode[0]}: {episode[1].name}"


def play(template: str, play: Play) -> tuple[list[int], Completion]:
    """The prompt's ids and what followed."""
    tokenizer = chat_tokenizer(template)
    kinds = {None: environment_kind(Counter, None)} if play.with_environment else {}
    tools = [tool_of(tool, "episode.tools") for tool in TOOLS]
    # TRL counts calls that are answered, and knows no longest turn.
    world = World(EpisodeConfig(max_turns=20), tools, kinds, tokenizer, {}, {tokenizer.eos_token_id})
    engine = Scripted(tokenizer, lambda turn: turn_text(template, play.turns[turn.number]))
    ids = tokenizer.apply_chat_template(
        QUESTION, tools=[tool.schema for tool in tools], add_generation_prompt=True, return_dict=False
    )
    driver = Driver(engine, play.limit, world)
    ((one, other),) = driver.generate([Prompt(0, QUESTION, list(ids), {"start": 0})], [(7, 0, 0, 0)], 2)
    driver.close()
    assert one.token_ids == other.token_ids
    return list(engine.asked[0].token_ids), one


@pytest.mark.parametrize("episode", ALIKE, ids=named)
def test_prompt_completion_mask_and_messages_are_those_of_trl(episode: tuple[str, Play]) -> None:
    recorded = BY_NAME[episode[0], episode[1].name]
    prompt_ids, completion = play(*episode)
    assert prompt_ids == RECORDED["prompts"][setting_of(*episode)]
    assert completion.token_ids == recorded["completion_ids"]
    sampled = completion.sampled or [True] * len(completion.token_ids)
    assert "".join(str(int(own)) for own in sampled) == recorded["mask"]
    assert completion.messages == recorded["messages"]


@pytest.mark.parametrize("episode", OTHER, ids=named)
def test_where_ours_differs_it_is_in_what_is_answered_alone(episode: tuple[str, Play]) -> None:
    recorded = BY_NAME[episode[0], episode[1].name]
    prompt_ids, completion = play(*episode)
    assert prompt_ids == RECORDED["prompts"][setting_of(*episode)]
    assert completion.messages is not None
    assert completion.messages != recorded["messages"], episode[1].differs
    ours, theirs = (
        [m | {"content": m["content"].strip()} for m in messages if m["role"] == "assistant"]
        for messages in (completion.messages, recorded["messages"])
    )
    assert ours == theirs
    assert completion.sampled is not None
    said = [token for token, own in zip(completion.token_ids, completion.sampled, strict=True) if own]
    kept = [token for token, own in zip(recorded["completion_ids"], recorded["mask"], strict=True) if own == "1"]
    assert said == kept


def test_results_come_in_the_order_of_the_calls() -> None:
    """TRL awaits all async calls of a turn behind the others, so that the model reads results in another order."""
    (entry,) = [play for play in plays_of("qwen2_5") if play.name == "async before sync"]
    _, completion = play("qwen2_5", entry)
    theirs = BY_NAME["qwen2_5", entry.name]["messages"]
    assert completion.messages is not None
    assert [m["name"] for m in completion.messages if m["role"] == "tool"] == ["ask", "add"]
    assert [m["name"] for m in theirs if m["role"] == "tool"] == ["add", "ask"]


def test_all_plays_are_recorded() -> None:
    assert BY_NAME.keys() == {(template, play.name) for template, play in EPISODES}
