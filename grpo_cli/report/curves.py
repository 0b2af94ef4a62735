"""What can be said of a metric over the steps of a run: arithmetic of lists in which None is a gap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHORTEST_END = 5
"""Steps at an end of a run that are averaged, where there are twice as many; of a longer run a fifth."""

SURE = 3.0
"""Standard errors of a difference that make it one. Of two means of five steps each, chance alone makes 3 in one
of 60 comparisons; a report makes some twenty."""

SUSPECTED = 2.0
"""Standard errors below which there is no difference to speak of."""


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are there and finite."""
    return [value for value in values if value is not None and math.isfinite(value)]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None if there is none."""
    there = known(values)
    return sum(value / len(there) for value in there) if there else None


@dataclass(frozen=True)
class Change:
    """From the first steps of a run to the last."""

    first: float
    last: float
    error: float
    """Standard error of the difference, steps taken as independent; infinite of a single step."""
    last_error: float
    """Standard error of `last` alone."""
    span: int
    """Steps at either end."""

    @property
    def in_errors(self) -> float:
        """The difference in standard errors, 0 if there is none."""
        difference = self.last - self.first
        if difference == 0:
            return 0.0
        return difference / self.error if self.error > 0 else math.copysign(math.inf, difference)

    @property
    def rose(self) -> bool:
        return self.in_errors >= SURE

    @property
    def fell(self) -> bool:
        return self.in_errors <= -SURE

    @property
    def stayed(self) -> bool:
        """Not: rose or fell for sure. Between the two nothing is known."""
        return abs(self.in_errors) < SUSPECTED

    def __str__(self) -> str:
        if self.span == 1:
            return f"from {self.first:.3g} in the first step to {self.last:.3g} in the last"
        return (
            f"from {self.first:.3g} over the first {self.span} steps to {self.last:.3g} over the last {self.span}"
        )


def change(values: Sequence[float | None]) -> Change | None:
    """From the first values to the last; None where fewer than two are known."""
    there = known(values)
    if len(there) < 2:
        return None
    span = max(min(SHORTEST_END, len(there) // 2), len(there) // 5)
    first, last = there[:span], there[-span:]
    first_mean, last_mean = mean(first), mean(last)
    assert first_mean is not None
    assert last_mean is not None
    of_first, of_last = _squared_error(first), _squared_error(last)
    return Change(first_mean, last_mean, math.sqrt(of_first + of_last), math.sqrt(of_last), span)


def _squared_error(values: Sequence[float]) -> float:
    """The square of the standard error of their mean; infinite of one value."""
    count = len(values)
    if count < 2:
        return math.inf
    middle = sum(value / count for value in values)
    deviations = [value - middle for value in values]
    # A product that is too large is infinite, where a power would raise.
    return sum(one * one for one in deviations) / (count - 1) / count


def latest(values: Sequence[float | None]) -> float | None:
    """The mean of the last steps, as in `change`; of one value, that."""
    ends = change(values)
    return mean(values) if ends is None else ends.last
