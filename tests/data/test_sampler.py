"""Every epoch visits every prompt once, and a step's prompts do not depend on what was asked before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_cli.data.sampler import PromptSampler

SIZES = st.integers(1, 20)
SEEDS = st.integers(0, 2**40)


def stream(sampler: PromptSampler, length: int) -> list[int]:
    steps = -(-length // sampler.prompts_per_step)
    return [prompt for step in range(steps) for prompt in sampler.at(step)][:length]


@given(SIZES, SIZES, SEEDS, st.booleans())
def test_every_epoch_visits_every_prompt_once(prompts: int, per_step: int, seed: int, shuffle: bool) -> None:
    visited = stream(PromptSampler(prompts, per_step, seed, shuffle), 4 * prompts)
    for start in range(0, 4 * prompts, prompts):
        assert sorted(visited[start : start + prompts]) == list(range(prompts))


@given(SIZES, SIZES, SEEDS, st.lists(st.integers(0, 100), max_size=20))
def test_a_step_is_the_same_in_any_order_of_calls(
    prompts: int, per_step: int, seed: int, asked: list[int]
) -> None:
    sampler = PromptSampler(prompts, per_step, seed, shuffle=True)
    for step in asked:
        assert sampler.at(step) == PromptSampler(prompts, per_step, seed, shuffle=True).at(step)
        assert len(sampler.at(step)) == per_step


@given(SIZES, SIZES, SIZES, SEEDS)
def test_the_stream_does_not_depend_on_how_it_is_cut_into_steps(
    prompts: int, one: int, other: int, seed: int
) -> None:
    cut = [stream(PromptSampler(prompts, per_step, seed, True), 3 * prompts) for per_step in (one, other)]
    assert cut[0] == cut[1]


def test_without_shuffle_the_order_is_that_of_the_data() -> None:
    sampler = PromptSampler(5, 3, seed=1, shuffle=False)
    assert [sampler.at(step) for step in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_a_step_may_hold_more_prompts_than_there_are() -> None:
    assert PromptSampler(2, 5, seed=1, shuffle=False).at(1) == [1, 0, 1, 0, 1]


def test_epochs_and_seeds_differ() -> None:
    first = PromptSampler(100, 100, seed=1, shuffle=True)
    assert first.at(0) != first.at(1)
    assert first.at(0) != PromptSampler(100, 100, seed=2, shuffle=True).at(0)


def test_the_order_of_a_seed_never_changes() -> None:
    assert PromptSampler(8, 8, seed=42, shuffle=True).at(0) == [1, 3, 5, 7, 4, 6, 0, 2]


@given(SIZES, SIZES, SEEDS, st.booleans(), st.integers(0, 50), st.lists(st.integers(0, 8), max_size=5))
def test_further_prompts_come_once_each_and_the_step_s_own_last(
    prompts: int, per_step: int, seed: int, shuffle: bool, step: int, rounds: list[int]
) -> None:
    sampler = PromptSampler(prompts, per_step, seed, shuffle)
    drawn: list[int] = []
    for count in rounds:
        drawn += sampler.further(step, len(drawn), count)
    assert drawn == PromptSampler(prompts, per_step, seed, shuffle).further(step, 0, len(drawn))
    others = prompts - len(set(sampler.at(step)))
    assert not set(drawn[:others]) & set(sampler.at(step))
    assert len(set(drawn[:prompts])) == min(prompts, len(drawn))


def test_further_prompts_are_drawn_for_each_step_and_seed() -> None:
    sampler = PromptSampler(1000, 4, seed=1, shuffle=True)
    assert sampler.further(0, 0, 20) != sampler.further(1, 0, 20)
    assert sampler.further(0, 0, 20) != PromptSampler(1000, 4, seed=2, shuffle=True).further(0, 0, 20)


def test_without_shuffle_further_prompts_follow_in_the_data() -> None:
    assert PromptSampler(6, 2, seed=1, shuffle=False).further(1, 0, 7) == [4, 5, 0, 1, 2, 3, 4]


def test_epoch_counts_passes_over_the_data() -> None:
    sampler = PromptSampler(10, 4, seed=1, shuffle=True)
    assert [sampler.epoch(step) for step in (0, 1, 5)] == pytest.approx([0, 0.4, 2])


def test_prompts_are_plain_integers() -> None:
    assert all(type(prompt) is int for prompt in PromptSampler(5, 5, seed=1, shuffle=True).at(0))


@pytest.mark.parametrize(("prompts", "per_step"), [(0, 1), (1, 0)])
def test_nothing_to_draw_from_is_refused(prompts: int, per_step: int) -> None:
    with pytest.raises(ValueError, match="needs a prompt"):
        PromptSampler(prompts, per_step, seed=1, shuffle=True)


def test_a_step_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        PromptSampler(1, 1, seed=1, shuffle=True).at(-1)
