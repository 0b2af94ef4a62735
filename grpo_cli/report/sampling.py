"""What a page shows of a run that is larger than a page: limits, and what is kept within them. No I/O.

Every rule here is told on the page: `page_data.py` and `page_completions.py` make the sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

MAX_POINTS = 600
"""Of a curve; the curves of several runs share twice as many."""

MIN_POINTS = 100
"""Of a curve, however many runs there are."""

MAX_STEPS = 40
"""Whose completions are on the page, over all runs."""

MAX_COMPLETIONS = 16
"""Of a group."""

MAX_IN_WHOLE_STEPS = 1000
"""Completions on the page up to which all groups of its steps are there."""

MAX_CHARACTERS = 2000
"""Of a prompt, and of a completion."""

MAX_BYTES = 20_000_000
"""Of all completions together, as the page holds them."""

SMOOTHED_SHARE = 20
"""A running mean is over one in so many points of its curve, and at least over 5."""


def points_of_a_curve(num_runs: int) -> int:
    """The most points that each curve of a page may have."""
    return max(MIN_POINTS, min(MAX_POINTS, 2 * MAX_POINTS // num_runs))


def bin_width(num_values: int, max_points: int) -> int:
    """How many values in a row become a point."""
    return max(1, math.ceil(num_values / max_points))


@dataclass(frozen=True)
class Binned:
    """A curve's points; NaN where no value of a bin is a number."""

    mean: Any  # (B,)
    low: Any  # (B,), the least value of each bin
    high: Any  # (B,)


def binned(values: Any, width: int) -> Binned:
    """Summarise each `width` values in a row; the last bin may have fewer.

    Args:
        values: (N,), NaN where there is no number.
        width: at least 1.
    """
    padded = np.full(-(-len(values) // width) * width, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, width)  # (B, width)
    counts = (~np.isnan(rows)).sum(1)
    mean = np.where(counts > 0, np.nansum(rows, 1) / np.maximum(counts, 1), np.nan)
    low = np.where(counts > 0, np.where(np.isnan(rows), np.inf, rows).min(1), np.nan)
    high = np.where(counts > 0, np.where(np.isnan(rows), -np.inf, rows).max(1), np.nan)
    return Binned(mean, low, high)


def smoothing_window(num_values: int) -> int:
    """How many values a running mean is over: an odd number."""
    return max(5, num_values // SMOOTHED_SHARE) | 1


def running_mean(values: Any, window: int) -> Any:
    """The mean of the values around each, fewer at the ends; NaN where none is a number.

    Args:
        values: (N,), NaN where there is no number.
        window: an odd number of values.
    """
    is_number = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_number, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_number)])
    places = np.arange(len(values))
    starts, ends = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    count = counts[ends] - counts[starts]
    return np.where(count > 0, (sums[ends] - sums[starts]) / np.maximum(count, 1), np.nan)


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, at even distances, the first and the last among them if `count` is above 1."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[-1]]
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


@dataclass(frozen=True)
class ChosenGroup:
    group: int
    reasons: list[str]
    """Why it is shown; none if all groups of the step are."""


def chosen_groups(rewards: Sequence[Sequence[float | None]]) -> list[ChosenGroup]:
    """The groups of a step with the least and the greatest mean reward, and the one with the widest spread; of no
    more than three all.

    Args:
        rewards: of the completions of each group, None where nothing was scored.
    """
    if len(rewards) <= 3:
        return [ChosenGroup(group, []) for group in range(len(rewards))]
    scored = [[score for score in group if score is not None] for group in rewards]
    judged = [group for group, scores in enumerate(scored) if scores] or [0]
    means = [float(np.mean(scores)) if scores else 0.0 for scores in scored]
    spreads = [float(np.std(scores)) if scores else 0.0 for scores in scored]
    reasons: dict[int, list[str]] = {}
    for reason, group in (
        ("lowest reward", min(judged, key=means.__getitem__)),
        ("highest reward", max(judged, key=means.__getitem__)),
        ("widest spread", max(judged, key=spreads.__getitem__)),
    ):
        reasons.setdefault(group, []).append(reason)
    return [ChosenGroup(group, reasons[group]) for group in sorted(reasons)]


def chosen_samples(rewards: Sequence[float | None]) -> list[int]:
    """The places of a group's completions that are shown: of many those of least and of greatest reward."""
    places = range(len(rewards))
    if len(rewards) <= MAX_COMPLETIONS:
        return list(places)
    ordered = sorted(places, key=lambda place: (rewards[place] is not None, rewards[place] or 0.0))
    half = MAX_COMPLETIONS // 2
    return sorted([*ordered[:half], *ordered[-half:]])


CutText = str | tuple[str, int, str]
"""A text, or of a long one its beginning, the number of characters left out, and its end."""


def cut(text: str, limit: int = MAX_CHARACTERS) -> CutText:
    """Leave out the middle of a text that has more than `limit` characters."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return text[:half], len(text) - 2 * half, text[-half:]


def cut_tokens(texts: Sequence[str], limit: int = MAX_CHARACTERS) -> tuple[int, int] | None:
    """Which tokens to leave out, from a place up to another, so that the rest has at most `limit` characters."""
    if sum(map(len, texts)) <= limit:
        return None
    ends = np.cumsum([len(text) for text in texts])
    start = int(np.searchsorted(ends, limit // 2, side="right"))
    end = int(np.searchsorted(ends, ends[-1] - limit // 2, side="left")) + 1
    return (start, max(start, end)) if end > start else (start, start)
