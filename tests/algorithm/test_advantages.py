"""Advantages agree with TRL's own, run, and missing rewards leave the baseline alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.algorithm.advantages import compute_advantages, flat_groups

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_advantages.json").read_text())["cases"]


@pytest.mark.parametrize("case", GOLDEN)
def test_advantages_equal_trl(case: dict[str, Any]) -> None:
    rewards = torch.tensor(
        [[float("nan") if value is None else value for value in column] for column in case["rewards"]]
    ).T
    advantages = compute_advantages(
        rewards, case["weights"], case["num_generations"], case["scale_rewards"], case["aggregation"]
    )
    torch.testing.assert_close(advantages, torch.tensor(case["advantages"]), rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.floats(-10, 10))
def test_advantages_sum_to_zero_and_ignore_a_constant(rewards: list[float], shift: float) -> None:
    column = torch.tensor(rewards, dtype=torch.float64)[:, None]
    advantages = compute_advantages(column, [1.0], 4, "group", "sum_then_normalize")
    assert advantages.sum().item() == pytest.approx(0, abs=1e-4)
    moved = compute_advantages(column + shift, [1.0], 4, "group", "sum_then_normalize")
    torch.testing.assert_close(advantages, moved, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_group_of_equal_rewards_has_exactly_zero_advantages(scale_rewards: Any) -> None:
    rewards = torch.tensor([[0.1], [0.1], [0.1], [0.3], [0.2], [0.7]])
    advantages = compute_advantages(rewards, [0.7], 3, scale_rewards, "sum_then_normalize")
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages[3:].abs().min() > 0


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
@pytest.mark.parametrize("factor", [1e10, 1e160, -1e300])
def test_rewards_whose_squares_are_too_large_have_the_advantages_of_smaller_ones(
    factor: float, scale_rewards: Any, aggregation: Any
) -> None:
    rewards = torch.tensor([[0.0], [1.0], [5.0], [torch.nan], [2.0], [2.0], [2.0], [3.0]], dtype=torch.float64)
    large = compute_advantages(rewards * factor, [1.0], 4, scale_rewards, aggregation)
    small = compute_advantages(rewards * math.copysign(1e8, factor), [1.0], 4, scale_rewards, aggregation)
    torch.testing.assert_close(large, small)
    assert flat_groups(rewards * factor, [1.0], 4).tolist() == [False, False]


def test_a_completion_without_any_reward_leaves_the_baseline_alone() -> None:
    nan = float("nan")
    rewards = torch.tensor([[1.0, nan], [3.0, nan], [nan, nan], [nan, nan]])
    advantages = compute_advantages(rewards, [1.0, 1.0], 4, "none", "sum_then_normalize")
    assert advantages.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_a_group_is_flat_if_its_weighted_rewards_have_no_spread() -> None:
    nan = float("nan")
    rewards = torch.tensor(
        [
            *([0.1, nan], [0.1, nan]),  # equal
            *([0.1, 0.0], [0.3, 0.0]),  # not
            *([1.0, 0.0], [0.0, 0.5]),  # equal once weighted
            *([nan, nan], [nan, nan]),  # nothing to compare
            *([nan, nan], [3.0, 1.0]),  # nothing to compare with
        ],
        dtype=torch.float64,
    )
    assert flat_groups(rewards, [1.0, 2.0], 2).tolist() == [True, False, True, True, True]
    assert flat_groups(rewards[:0], [1.0, 2.0], 2).tolist() == []
