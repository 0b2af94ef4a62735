"""A curve in one line of text, for terminals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
FLAT = BLOCKS[3]
"""Of a curve whose values are all the same."""


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw values from left to right, the lowest as ▁ and the highest as █.

    Where there are more values than characters, each character is the mean of its share of them. A value that is
    None or not finite is left out; a character all of whose values are is a space.

    Args:
        values: in order.
        width: most characters of the line, at least 1.
    """
    count = min(width, len(values))
    edges = [place * len(values) // max(count, 1) for place in range(count + 1)]
    halves = [_half_mean(values[start:end]) for start, end in itertools.pairwise(edges)]
    known = [half for half in halves if half is not None]
    if not known:
        return " " * count
    low, high = min(known), max(known)
    return "".join(" " if half is None else _block(half, low, high) for half in halves)


def _half_mean(values: Sequence[float | None]) -> float | None:
    """Half of the mean: neither the sum of finite numbers nor their difference is then too large for a number."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(value / 2 / len(known) for value in known) if known else None


def _block(value: float, low: float, high: float) -> str:
    span = high - low
    if span <= 0:
        return FLAT
    return BLOCKS[min(int((value - low) / span * len(BLOCKS)), len(BLOCKS) - 1)]
