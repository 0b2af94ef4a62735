"""What is said of a metric over the steps of a run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_cli.report.curves import change, latest, mean


def test_a_rise_by_more_than_three_standard_errors_is_one() -> None:
    rising = change([0.0, 0.1, 0.0, 0.1, 0.0, 1.0, 1.1, 1.0, 1.1, 1.0])
    assert rising is not None
    assert (rising.first, rising.last) == (pytest.approx(0.04), pytest.approx(1.04))
    assert rising.error == pytest.approx(math.sqrt(2 * 0.003 / 5))
    assert rising.rose
    assert not rising.fell
    assert not rising.stayed


def test_noise_is_no_change() -> None:
    noisy = change([0.0, 1.0] * 10)
    assert noisy is not None
    assert noisy.stayed
    assert not noisy.rose


def test_two_steps_say_nothing_for_sure() -> None:
    two = change([0.0, 100.0])
    assert two is not None
    assert two.stayed


def test_a_long_run_is_compared_by_fifths() -> None:
    long = change([float(step) for step in range(100)])
    assert long is not None
    assert long.span == 20


def test_gaps_are_left_out() -> None:
    assert mean([None, 1.0, math.nan, 3.0]) == 2.0
    assert mean([None]) is None
    assert latest([None, 4.0]) == 4.0
    assert change([None, 1.0]) is None


@given(st.lists(st.none() | st.floats()))
def test_no_curve_is_too_wild(values: list[float | None]) -> None:
    found = change(values)
    assert found is None or isinstance(str(found), str)
    assert found is None or not (found.rose and found.fell)
