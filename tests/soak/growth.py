"""Tells whether something that was measured at every step of a run grows. Robust against steps that stand out.

The first quarter of a run is its warm-up. Of the rest, the second quarter is compared with the last one, and the
slope is the median of the slopes between all pairs of steps (Theil-Sen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measure:
    """What is measured, and how much of it may come with each step."""

    name: str
    unit: str = ""
    per_step: float | None = None
    """For amounts. Empty for a number of things: the least of the last quarter may not be above the least of the
    second one, so that a thread that ends a little late does not count, and one that never ends does."""
    slack: float = 0.0
    """What the amount may grow by in addition, however long the run."""
    ratio: float | None = None
    """For times: how many times as long a step may take at the end; infinite if it is only reported."""


@dataclass(frozen=True)
class Trend:
    """What a measure did over a run."""

    measure: Measure
    second: float
    """Median of the second quarter."""
    last: float
    """Median of the last quarter."""
    slope: float
    """By step, after the warm-up."""
    grows: bool


def trend(measure: Measure, values: np.ndarray) -> Trend:
    """Judge one measure.

    Args:
        measure: what it is.
        values: (S,) of the steps, in order; at least eight.
    """
    quarter = len(values) // 4
    warm, second, last = values[quarter:], values[quarter : 2 * quarter], values[-quarter:]
    slope = theil_sen(warm)
    if measure.ratio is not None:
        grows = np.median(last) > measure.ratio * np.median(second)
    elif measure.per_step is not None:
        grows = slope * len(warm) > measure.per_step * len(warm) + measure.slack
    else:
        grows = last.min() > second.min()
    return Trend(measure, float(np.median(second)), float(np.median(last)), slope, bool(grows))


def theil_sen(values: np.ndarray) -> float:
    """Median of the slopes between all pairs of the (S,) values, which are one step apart."""
    earlier, later = np.triu_indices(len(values), 1)
    return float(np.median((values[later] - values[earlier]) / (later - earlier)))


def table(trends: Sequence[Trend], steps: int) -> list[str]:
    """Lines of a Markdown table; a slope's unit is that of the measure, by step."""
    rows = ["| measure | second quarter | last quarter | slope by step | allowed |", "|---|---|---|---|---|"]
    for found in trends:
        unit = f" {found.measure.unit}" if found.measure.unit else ""
        limit = allowed(found.measure, steps)
        verdict = f"**{limit}: exceeded**" if found.grows else limit
        cells = f"{_short(found.second)}{unit}", f"{_short(found.last)}{unit}", f"{found.slope:+.3g}{unit}"
        rows.append(f"| {found.measure.name} | {' | '.join(cells)} | {verdict} |")
    return rows


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def allowed(measure: Measure, steps: int) -> str:
    """The bound of a measure, in words."""
    if measure.ratio is not None:
        return f"{measure.ratio:g} times" if np.isfinite(measure.ratio) else "reported only"
    if measure.per_step is None:
        return "none more"
    each = measure.per_step + measure.slack / (steps - steps // 4)
    return f"{each:,.3g} {measure.unit} a step".replace("  ", " ")
