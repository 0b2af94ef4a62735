"""What a page leaves out is chosen by rules that keep what matters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grpo_cli.report import sampling


def test_bins_keep_mean_least_and_greatest_and_skip_what_is_no_number() -> None:
    points = sampling.binned(np.array([1.0, 3.0, math.nan, 5.0, math.nan, math.nan, 7.0]), 2)
    assert points.mean.tolist() == pytest.approx([2.0, 5.0, math.nan, 7.0], nan_ok=True)
    assert points.low.tolist() == pytest.approx([1.0, 5.0, math.nan, 7.0], nan_ok=True)
    assert points.high.tolist() == pytest.approx([3.0, 5.0, math.nan, 7.0], nan_ok=True)


def test_a_curve_never_has_more_points_than_allowed() -> None:
    for num_values in (1, 599, 600, 601, 10_000, 999_999):
        width = sampling.bin_width(num_values, 600)
        assert len(sampling.binned(np.zeros(num_values), width).mean) <= 600
    assert sampling.points_of_a_curve(1) == sampling.MAX_POINTS
    assert sampling.points_of_a_curve(100) == sampling.MIN_POINTS


def test_a_running_mean_is_over_what_is_around() -> None:
    mean = sampling.running_mean(np.array([0.0, 3.0, math.nan, 6.0, 9.0]), 3)
    assert mean.tolist() == [1.5, 1.5, 4.5, 7.5, 7.5]
    assert sampling.smoothing_window(10) == 5
    assert sampling.smoothing_window(1000) == 51


def test_steps_are_evenly_spaced_with_the_first_and_the_last() -> None:
    assert sampling.evenly_spaced(range(1, 10_001), 5) == [1, 2501, 5001, 7500, 10_000]
    assert sampling.evenly_spaced([3, 4], 5) == [3, 4]
    assert sampling.evenly_spaced([], 5) == []
    assert sampling.evenly_spaced([1, 2, 3], 1) == [3]


def test_the_worst_the_best_and_the_most_spread_groups_are_chosen() -> None:
    groups = [[0.5, 0.5], [0.0, 0.2], [1.0, 0.9], [0.0, 1.0], [0.6, 0.5]]
    chosen = sampling.chosen_groups(groups)
    assert [(one.group, one.reasons) for one in chosen] == [
        (1, ["lowest reward"]),
        (2, ["highest reward"]),
        (3, ["widest spread"]),
    ]
    assert [one.group for one in sampling.chosen_groups(groups[:3])] == [0, 1, 2]
    assert [one.group for one in sampling.chosen_groups([[None, None]] * 5)] == [0]


def test_of_a_large_group_the_least_and_the_greatest_rewards_are_chosen() -> None:
    rewards = [float(number) for number in range(40)]
    assert sampling.chosen_samples(rewards) == [*range(8), *range(32, 40)]
    assert sampling.chosen_samples(rewards[:16]) == list(range(16))


def test_a_long_text_loses_its_middle_and_says_how_much() -> None:
    assert sampling.cut("short", 10) == "short"
    assert sampling.cut("0123456789abc", 10) == ("01234", 3, "89abc")


@pytest.mark.parametrize("limit", [1, 6, 7, 100])
def test_tokens_left_out_leave_no_more_than_the_limit(limit: int) -> None:
    texts = ["ab", "c", "", "defg", "h", "ij"]
    cut = sampling.cut_tokens(texts, limit)
    if cut is None:
        assert limit == 100
    else:
        kept = [*texts[: cut[0]], *texts[cut[1] :]]
        assert sum(map(len, kept)) <= limit
        assert 0 <= cut[0] <= cut[1] <= len(texts)
