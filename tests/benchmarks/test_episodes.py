"""`benchmarks.episodes`: what it plays and what it counts. Nothing is timed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from benchmarks._players import PLAYERS, Spec
from benchmarks._scripts import CHAT_TEMPLATE, Plan, Played, digest, distinct_tokens, script_of
from benchmarks.episodes import bars_of, row_of
from tests.episode.chat import chat_tokenizer

PLAN = Plan(prompts=2, group_size=2, turns=3, prompt=5, shortest=70, longest=80, result=4, longest_wait=0.01)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = chat_tokenizer("qwen2_5")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.pad_token = "</s>"
    return tokenizer


def model_of(tokenizer: Any) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, **shape)
    return Qwen2ForCausalLM(config)


def test_beginnings_in_common_are_counted_once() -> None:
    assert distinct_tokens([[1, 2, 3], [1, 2, 4, 5], [1, 2], [2]]) == 6
    assert digest([[1, 2], [3]]) != digest([[1], [2, 3]])


def test_a_script_is_the_same_for_the_same_seed_and_as_long_as_planned(tokenizer: Any) -> None:
    script, again, other = (script_of(PLAN, tokenizer, seed) for seed in (1, 1, 2))
    assert script == again
    assert script.turns != other.turns
    assert {len(episode) for episode in script.turns} == {PLAN.turns}
    assert all(PLAN.shortest <= len(turn) <= PLAN.longest for episode in script.turns for turn in episode)
    assert all(0 <= wait <= PLAN.longest_wait for wait in script.waits)


def play(system: str, tokenizer: Any, seed: int = 1) -> Played:
    player = PLAYERS[system](Spec(system, "tiny", "cpu", {}), model_of(tokenizer), tokenizer)
    return player(PLAN, script_of(PLAN, tokenizer, seed))


def test_ours_plays_the_script_and_computes_hardly_a_token_twice(tokenizer: Any) -> None:
    played = play("ours", tokenizer)
    assert played.passes > PLAN.turns * PLAN.shortest
    assert played.distinct > PLAN.episodes * PLAN.turns * PLAN.shortest
    assert played.computed < 1.2 * played.distinct  # prompts begin alike, and are short here
    assert 0 <= played.idle < played.seconds


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is a rival of the benchmarks alone")
def test_trl_plays_the_same_episodes(tokenizer: Any) -> None:
    ours, trl = play("ours", tokenizer), play("TRL", tokenizer)
    assert trl.digest == ours.digest
    assert trl.distinct == ours.distinct
    assert trl.computed > 1.5 * trl.distinct


def test_bars_are_judged_by_medians() -> None:
    def played(seconds: float, idle: float) -> Played:
        return Played(seconds, idle, forward=1, passes=3, computed=104, distinct=100, digest="")

    rollouts = {"TRL": [played(20, 9), played(30, 9), played(90, 9)], "ours": [played(10, 1), played(12, 1.2)] * 2}
    bars = list(map(str, bars_of(rollouts)))
    assert [bar.split()[0] for bar in bars] == ["PASS", "PASS", "PASS"]
    assert bars[0].endswith("2.73 (≥ 2.0)")
    assert row_of("ours", rollouts["ours"])[2:5] == ["11.0", "1.1", "10%"]
