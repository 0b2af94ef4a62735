"""A run in words, in the terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from grpo_cli.record.completions import completions_file
from grpo_cli.report.run import Run, read_run
from grpo_cli.report.text import print_report
from tests.report.made_up import made_up, ramp, seldom
from tests.report.run_folders import MadeUp, write_run


def printed(*runs: Run) -> str:
    out = io.StringIO()
    print_report(runs, Console(width=120, file=out))
    return out.getvalue()


def test_a_run_is_told_in_words_with_its_curves_and_findings() -> None:
    text = printed(made_up({"completions/clipped_ratio": 0.7}))
    assert "made-up" in text
    assert "rewarded by reward_len" in text
    assert "4 prompts x 8 completions a step" in text
    assert "The mean reward went from 0.238 over the first 5 steps to 0.562 over the last 5, +0.323" in text
    assert "It rose." in text
    assert "On held-out prompts it was 0.55 after step 24, 0.25 after step 6." in text
    assert "▁" in text
    assert "█" in text
    assert "time: generate 60%, train 30%" in text
    assert "truncated" in text
    assert "Raise generation.max_completion_tokens" in text


def test_what_chance_might_have_done_is_not_called_a_rise() -> None:
    text = printed(made_up({"reward": ramp(0.3, 0.3), "eval_reward": None}))
    assert "Chance alone might do as much." in text
    assert "Held-out prompts were not tried." in text


def test_several_runs_are_compared_first() -> None:
    text = printed(made_up(), replace(made_up({"reward": ramp(0.6, 0.2)}), folder=Path("runs/other")))
    table, first = text.index("reward, last"), text.index("rewarded by")
    assert table < first
    assert text.index("other") < first


def test_a_run_of_one_step_can_be_told() -> None:
    run = made_up({"eval_reward": seldom(0.5)})
    assert "Less than two steps have a reward" in printed(replace(run, rows=run.rows[:1], is_finished=False))


def test_of_a_few_steps_nothing_is_said_about_learning() -> None:
    run = made_up({"reward": 0.5})
    text = " ".join(printed(replace(run, rows=run.rows[:3], is_finished=False)).split())
    assert "from 0.5 in the first step to 0.5 in the last, +0. So few steps say nothing about learning." in text
    assert "inf" not in text.split("Held-out")[0]


def test_a_file_that_cannot_be_read_is_told_beside_what_else_is_found(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", MadeUp(metrics={"train/skipped_steps": 1.0}))
    completions_file(folder, 20).write_bytes(b"PAR1")
    text = " ".join(printed(read_run(folder)).split())
    assert "damaged_file" in text
    assert text.count("step-000020.parquet cannot be read") == 1
    assert "skipped_steps" in text


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    assert "[bold]x" in printed(replace(made_up(), folder=Path("runs/[bold]x")))
