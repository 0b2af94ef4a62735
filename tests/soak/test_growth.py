"""What grows is found, and what only jumps about is not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.soak.growth import Measure, table, theil_sen, trend

STEPS = 200
MEMORY = Measure("memory", "KiB", per_step=8, slack=8 * 1024)
FILES = Measure("files")
TIME = Measure("time", "ms", ratio=2.0)


def noise(scale: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, STEPS)


def test_the_slope_of_a_line_survives_wild_steps() -> None:
    values = 3.0 * np.arange(STEPS)
    values[::7] += 1e6
    assert theil_sen(values) == pytest.approx(3.0, rel=0.05)


def test_memory_that_grows_with_every_step_is_found() -> None:
    leak = 100.0 * np.arange(STEPS)
    assert trend(MEMORY, 300_000 + leak + noise(500)).grows
    assert "exceeded" in table([trend(MEMORY, leak)], STEPS)[-1]


def test_memory_that_grows_in_the_warm_up_only_is_fine() -> None:
    values = 300_000 + noise(500)
    values[: STEPS // 4] -= np.linspace(100_000, 0, STEPS // 4)
    values[120] += 200_000
    found = trend(MEMORY, values)
    assert not found.grows
    assert table([found], STEPS)[-1].endswith("| 62.6 KiB a step |")


def test_one_file_left_open_in_a_hundred_steps_is_found() -> None:
    assert trend(FILES, 20.0 + np.arange(STEPS) // 100).grows


def test_a_thread_that_ends_a_little_later_at_times_is_fine() -> None:
    assert not trend(FILES, 20.0 + (np.arange(STEPS) % 3 == 0)).grows


def test_steps_that_take_three_times_as_long_are_found_and_a_busy_moment_is_fine() -> None:
    values = np.full(STEPS, 100.0)
    values[60:80] = values[160:180] = 500.0
    assert not trend(TIME, values).grows
    assert trend(TIME, np.linspace(10.0, 400.0, STEPS)).grows
