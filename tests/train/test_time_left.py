"""How long a run still takes: pure functions of numbers."""

from __future__ import annotations

import pytest

from grpo_cli.train.time_left import SPEED_STEPS, TimeLeft, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (45.4, "45 s"), (59.6, "1 min"), (240, "4 min"), (3599, "1 h"), (4800, "1 h 20 min"),
        (7200, "2 h"), (86_399, "1 d"), (183_600, "2 d 3 h"), (172_800, "2 d"),
    ],
)  # fmt: skip
def test_a_duration_has_one_or_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_left_follows_from_whole_steps_with_what_is_between_them() -> None:
    left = TimeLeft(10)
    assert left.seconds(0) is None
    left.step_ended(1, 100, 60)
    assert left.seconds(100) == 9 * 60  # its own duration is all that is known
    left.step_ended(2, 200, 60)
    assert left.seconds(200) == 8 * 100  # a checkpoint was written in between


def test_slow_steps_count_down_and_one_that_is_overdue_stands_still() -> None:
    left = TimeLeft(3)
    left.step_ended(1, 1000, 600)
    assert [left.seconds(1000 + passed) for passed in (0, 100, 600, 900)] == [1200, 1100, 600, 600]
    left.step_ended(3, 3000, 600)
    assert left.seconds(3000) == 0


def test_after_a_resume_only_steps_of_this_process_count() -> None:
    left = TimeLeft(1000)
    left.step_ended(901, 50, 7)
    assert left.seconds(50) == 99 * 7


def test_the_estimate_forgets_the_steps_of_long_ago() -> None:
    left = TimeLeft(1000)
    now = 0.0
    for step in range(1, 101):
        now += 1000 if step <= 50 else 10
        left.step_ended(step, now, 1)
    assert SPEED_STEPS < 50
    assert left.seconds(now) == 900 * 10
