"""Evaluation scores every held-out prompt once, and pass@k is the chance that its name says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_cli.data.prompts import Prompt
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.reward.registry import reward_from_callable
from grpo_cli.reward.scorer import RewardError, Scorer
from grpo_cli.rollout.background import BackgroundScorer
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey
from grpo_cli.train.evaluate import evaluate, pass_at_k


def brute_force(rewards: list[float], k: int, pass_reward: float) -> float | None:
    """Share of the k-subsets of the scored completions that hold a correct one."""
    scored = [reward for reward in rewards if not math.isnan(reward)]
    subsets = list(itertools.combinations(scored, k))
    if not subsets:
        return None
    return sum(any(reward >= pass_reward for reward in subset) for subset in subsets) / len(subsets)


@given(
    st.integers(1, 6).flatmap(
        lambda size: st.lists(
            st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.nan]), min_size=size, max_size=size),
            min_size=1,
            max_size=4,
        )
    ),
    st.integers(1, 6),
)
def test_pass_at_k_is_what_counting_every_subset_gives(rows: list[list[float]], k: int) -> None:
    chances = [chance for row in rows if (chance := brute_force(row, k, 1.0)) is not None]
    value = pass_at_k(torch.tensor(rows), k, 1.0)
    if chances:
        assert value == pytest.approx(sum(chances) / len(chances))
    else:
        assert math.isnan(value)


class LengthEngine:
    """Completion j of the prompt [p] has p + j tokens; keeps what it was asked for."""

    def __init__(self) -> None:
        self.keys: list[SampleKey] = []
        self.sizes: list[int] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        self.keys.extend(keys)
        self.sizes.append(len(prompts))
        groups = [
            [
                Completion([7] * (p + j), [0.0] * (p + j), "stop" if j else "length", "x" * (p + j))
                for j in range(2)
            ]
            for p in (prompt.token_ids[0] for prompt in prompts)
        ]
        assert on_group is not None
        for index in reversed(range(len(groups))):
            on_group(index, groups[index])
        return groups


def length(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    assert answer == [prompt.upper() for prompt in prompts]
    return [float(len(text)) for text in completions]


def odd(completions: list[str]) -> list[float]:
    return [float(len(text) % 2) for text in completions]


def long_ones_fail(completions: list[str]) -> list[float]:
    assert all(len(text) < 6 for text in completions)
    return odd(completions)


def run(
    prompts_per_batch: int, second: Any = odd, workers: int = 0, **options: Any
) -> tuple[dict[str, float], LengthEngine]:
    dataset: Any = [Prompt(row, f"p{row}", [row + 1], {"answer": f"P{row}"}) for row in range(5)]
    engine = LengthEngine()
    scorer = Scorer(
        [replace(reward_from_callable(length), workers=workers), replace(reward_from_callable(second), weight=2.0)]
    )
    arguments: dict[str, Any] = {"seed": 9, "step": 3, "num_generations": 2} | options
    metrics = evaluate(
        engine, BackgroundScorer(scorer, Ranks()), dataset, prompts_per_batch=prompts_per_batch, **arguments
    )
    return metrics, engine


def test_every_prompt_is_scored_once_and_metrics_have_their_prefix() -> None:
    metrics, engine = run(2)
    assert engine.sizes == [2, 2, 1]
    assert len(set(engine.keys)) == 5, "every prompt draws from a stream of its own"
    assert all(name.startswith("eval_") for name in metrics)
    lengths = [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert metrics["eval_rewards/length/mean"] == pytest.approx(np.mean(lengths))
    assert metrics["eval_rewards/odd/mean"] == pytest.approx(0.5)
    assert metrics["eval_reward"] == pytest.approx(np.mean(lengths) + 1)
    assert metrics["eval_completions/mean_length"] == pytest.approx(np.mean(lengths))
    assert metrics["eval_completions/clipped_ratio"] == 0.5


def test_the_numbers_do_not_depend_on_how_many_prompts_are_generated_at_once() -> None:
    assert run(1)[0] == run(2)[0] == run(100)[0]


def test_a_reward_function_with_workers_scores_held_out_prompts_too() -> None:
    assert run(2, workers=2)[0] == run(2)[0]


def test_a_reward_function_that_fails_says_so_with_the_step() -> None:
    with pytest.raises(RewardError, match="reward long_ones_fail, step 3: raised AssertionError"):
        run(2, long_ones_fail)


def test_two_evaluations_draw_alike_and_another_seed_draws_otherwise() -> None:
    assert run(2)[1].keys == run(2)[1].keys
    assert not set(run(2)[1].keys) & set(run(2, seed=10)[1].keys)


def test_pass_at_is_1_and_the_group_unless_asked_for() -> None:
    metrics, _ = run(5)
    assert {name for name in metrics if "pass@" in name} == {"eval_pass@1", "eval_pass@2"}
    metrics, _ = run(5, pass_at=[2], pass_reward=6.5)
    assert {name for name in metrics if "pass@" in name} == {"eval_pass@2"}
    # length + 2 * odd: the totals are 3 2 | 2 5 | 5 4 | 4 7 | 7 6
    assert metrics["eval_pass@2"] == pytest.approx(2 / 5)
