"""What a run shows: on a terminal a progress line, in a log file lines."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

import grpo_cli
from grpo_cli.report.sparkline import BLOCKS
from grpo_cli.train import display
from grpo_cli.train.display import Display


def metrics(step: int, reward: float) -> dict[str, float]:
    return {"step": step, "reward": reward, "tokens_per_second": 100.0, "time/step": 60.0}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def shown(**console: Any) -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    return Display(Console(file=file, width=100, **console), max_steps=5, every=1), file


def test_a_line_of_a_log_file_says_how_long_it_still_takes_until_the_last(clock: Clock) -> None:
    screen, file = shown()
    with screen:
        for step in (1, 2, 3, 4, 5):
            clock.now += 90
            screen.step(metrics(step, -step))
    lines = file.getvalue().splitlines()
    assert lines[0] == "step 1/5  reward -1  100 tokens/s  4 min left"  # 4 of 60 s
    assert lines[1].endswith("tokens/s  4 min left")  # 3 of 90 s, which is more than 60
    assert lines[3].endswith("tokens/s  2 min left")
    assert lines[4].endswith("tokens/s")


def progress_line(screen: Display) -> str:
    with screen.console.capture() as capture:
        screen.console.print(screen._progress.get_renderable())
    return capture.get()


def test_a_terminal_shows_the_course_of_the_reward_and_the_time_left(clock: Clock) -> None:
    screen, _ = shown(force_terminal=True, color_system=None)
    for step, reward in ((1, 0.0), (2, float("nan")), (3, 1.0)):
        clock.now += 90
        screen.step(metrics(step, reward))
    line = progress_line(screen)
    assert "3/5" in line
    assert "reward 1 ▁█ 3 min left" in line


def test_a_resumed_run_goes_on_where_it_stood(clock: Clock) -> None:
    screen, _ = shown(force_terminal=True, color_system=None)
    screen.resume(3, [3.0, None, 0.0])
    assert "3/5" in progress_line(screen)
    assert "█▁" in progress_line(screen)
    assert "left" not in progress_line(screen)  # no step of this process has told how long one takes
    clock.now += 1000
    screen.step(metrics(4, 3.0))
    assert "reward 3 █▁█ 1 min left" in progress_line(screen)


def test_the_progress_line_fits_into_eighty_columns(clock: Clock) -> None:
    screen = Display(Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None), 1000, 1)
    screen.resume(900, [float(step) for step in range(900)])
    screen.step(metrics(901, -1234.5) | {"time/step": 4800.0 / 99})
    assert progress_line(screen).rstrip().endswith("1 h 20 min left")
    assert progress_line(screen).count("\n") == 1
    screen.console.width = 50
    assert progress_line(screen).count("\n") == 1  # cut, but no more lines than one


def test_a_terminal_without_block_characters_is_given_none(clock: Clock) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    screen = Display(Console(file=file, width=100, force_terminal=True, color_system=None), 5, 1)
    screen.step(metrics(1, 0.0))
    screen.step(metrics(2, 1.0))
    progress_line(screen).encode("ascii")


def test_a_run_that_is_resumed_shows_the_rewards_of_the_steps_before(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["train"] |= {"max_steps": 2, "save_every": 2}
    grpo_cli.train(tiny_recipe, console=Console(quiet=True))
    tiny_recipe["train"]["max_steps"] = 3
    file = io.StringIO()
    grpo_cli.train(tiny_recipe, resume=True, console=Console(file=file, width=100, force_terminal=True))
    courses = {len(course) for course in re.findall(f"[{BLOCKS}]+", file.getvalue())}
    assert 3 in courses
    assert 1 not in courses
    assert "3/3" in file.getvalue()
