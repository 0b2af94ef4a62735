"""The curves of a page: what its scripts are given to draw, within the limits of `sampling.py`. No I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_cli.report.page_plots import Line, Plot, Section, sections
from grpo_cli.report.run import Run
from grpo_cli.report.sampling import bin_width, binned, points_of_a_curve, running_mean, smoothing_window

MAX_OTHER = 60
"""Plots of the section "Other"."""

FEW_POINTS = 30
"""A curve with no more points shows them as dots."""

LEAST_SMOOTHED = 10
"""Points of a curve that gets a running mean."""


class Curves:
    """Makes the curves of a page, and remembers what was left out of them."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._max_points = points_of_a_curve(len(runs))
        self._steps: dict[tuple[int, ...], int] = {}
        self._widest = 1
        self._not_finite: dict[str, int] = {}
        self._other_left_out: list[str] = []

    def data(self) -> dict[str, Any]:
        """For the page: sections of plots of lines. A line's `x` is a place in `steps`."""
        names = dict.fromkeys(name for run in self._runs for name in run.metric_names)
        functions = dict.fromkeys(name for run in self._runs for name in run.reward_names)
        made = [self._section(section) for section in sections(names, functions)]
        return {"sections": [one for one in made if one["plots"] or one["zero"]], "steps": list(self._steps)}

    def notes(self) -> list[str]:
        """What the curves leave out, a sentence each."""
        notes = []
        if self._widest > 1:
            notes.append(
                f"A curve has at most {self._max_points} points: in the longest run {self._widest} steps in a row "
                "are one point, their mean. In a plot of one line without a band of its own, one goes from their "
                "least to their greatest value."
            )
        if self._not_finite:
            counts = ", ".join(f"{name} ({count} steps)" for name, count in self._not_finite.items())
            notes.append(f"Values that were not finite are gaps: {counts}.")
        if self._other_left_out:
            notes.append(f"Metrics without a plot, beyond {MAX_OTHER} others: {', '.join(self._other_left_out)}.")
        return notes

    def _section(self, section: Section) -> dict[str, Any]:
        plots: list[dict[str, Any]] = []
        zero: list[str] = []
        for plot in section.plots:
            made = self._plot(plot)
            is_zero = all(not any(line["y"]) for line in made["lines"])
            zero.extend(line.metric for line in plot.lines) if is_zero else plots.append(made)
        if section.title == "Other":
            self._other_left_out = [plot["title"] for plot in plots[MAX_OTHER:]]
            plots = plots[:MAX_OTHER]
        return {"title": section.title, "plots": plots, "zero": zero}

    def _plot(self, plot: Plot) -> dict[str, Any]:
        lines = []
        for place, line in enumerate(plot.lines):
            for number, run in enumerate(self._runs):
                made = self._line(run, line, is_alone=len(plot.lines) == 1)
                if made is not None:
                    lines.append({"run": number, "label": line.label or plot.title, "place": place} | made)
        return {"title": plot.title, "about": plot.about, "stacked": plot.is_stacked, "lines": lines}

    def _line(self, run: Run, line: Line, *, is_alone: bool) -> dict[str, Any] | None:
        rows = [row for row in run.rows if line.metric in row]
        if not rows:
            return None
        values = _array(rows, line.metric)
        missing = int(np.isnan(values).sum())
        if missing:
            self._not_finite[line.metric] = self._not_finite.get(line.metric, 0) + missing
        width = bin_width(len(rows), self._max_points)
        self._widest = max(self._widest, width)
        steps = tuple(rows[min(start + width // 2, len(rows) - 1)]["step"] for start in range(0, len(rows), width))
        points = binned(values, width)
        made: dict[str, Any] = {"x": self._steps.setdefault(steps, len(self._steps)), "y": _rounded(points.mean)}
        made |= self._band(rows, line, points, width)
        if width > 1 and is_alone and "low" not in made:
            made |= {"low": _rounded(points.low), "high": _rounded(points.high)}
        if line.is_smoothed and len(rows) >= LEAST_SMOOTHED:
            window = smoothing_window(len(rows))
            made |= {"smooth": _rounded(binned(running_mean(values, window), width).mean), "window": window}
        return made | {"dots": len(steps) <= FEW_POINTS}

    def _band(self, rows: Sequence[dict[str, Any]], line: Line, points: Any, width: int) -> dict[str, Any]:
        if line.spread is not None and any(line.spread in row for row in rows):
            spread = binned(_array(rows, line.spread), width).mean
            return {"low": _rounded(points.mean - spread), "high": _rounded(points.mean + spread)}
        if line.low is not None and line.high is not None:
            low, high = binned(_array(rows, line.low), width).low, binned(_array(rows, line.high), width).high
            return {"low": _rounded(low), "high": _rounded(high)}
        return {}


def _array(rows: Sequence[dict[str, Any]], name: str) -> Any:
    """(N,), NaN where a row has no number."""
    values = [row.get(name) for row in rows]
    return np.array([math.nan if value is None or not math.isfinite(value) else value for value in values], float)


def _rounded(values: Any) -> list[float | None]:
    """Five digits, as many as a plot can show; None for NaN."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values.tolist()]
