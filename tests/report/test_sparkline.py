"""A curve in one line of text."""

from __future__ import annotations

import math
import sys

from hypothesis import example, given
from hypothesis import strategies as st

from grpo_cli.report.sparkline import BLOCKS, sparkline


def test_a_rising_curve_climbs_from_the_lowest_block_to_the_highest() -> None:
    assert sparkline(range(8), 8) == BLOCKS


def test_more_values_than_characters_are_averaged() -> None:
    assert sparkline([0, 0, 1, 1], 2) == "▁█"
    assert sparkline([0, 2, 0, 2, 5, 5], 3) == "▁▁█"


def test_fewer_values_than_characters_take_a_character_each() -> None:
    assert sparkline([1.0, 2.0], 40) == "▁█"


def test_a_flat_curve_is_a_line_in_the_middle() -> None:
    assert sparkline([3.0] * 4, 4) == "▄▄▄▄"


def test_values_that_are_not_there_leave_a_gap() -> None:
    assert sparkline([1.0, None, 2.0], 3) == "▁ █"
    assert sparkline([1.0, math.nan, math.inf, 2.0], 4) == "▁  █"
    assert sparkline([None, None], 5) == "  "
    assert sparkline([], 5) == ""


@example([sys.float_info.max] * 3, 1)
@given(st.lists(st.none() | st.floats()), st.integers(min_value=1, max_value=100))
def test_every_curve_can_be_drawn(values: list[float | None], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= set(BLOCKS) | {" "}
