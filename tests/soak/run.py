"""A long run of a tiny model with every feature on, measured after each step from inside its process."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

import grpo_cli
from grpo_cli.record.metrics import read_metrics
from tests.soak.growth import Measure, Trend, trend

SYSTEMS: Mapping[str, dict[str, Any]] = {
    "full": {},
    "adapter": {"lora": {"r": 2, "dropout": 0.1}, "gradient_checkpointing": True},
}
"""Name to what the recipe's `model` has beside its name."""

KEPT = 2
"""Checkpoints."""

MEASURES = (
    Measure("resident memory", "KiB", per_step=2, slack=8 * 1024),
    Measure("memory of child processes", "KiB", per_step=2, slack=4 * 1024),
    Measure("Python's small objects", per_step=20, slack=10_000),
    Measure("open files"),
    Measure("threads"),
    Measure("child processes"),
    Measure("processor time", "ms", ratio=2.0),
    Measure("time", "ms", ratio=np.inf),
)


class Watcher(grpo_cli.Callback):
    """Measures the process after each step, into an array that was there before."""

    def __init__(self, steps: int) -> None:
        self.rows = np.zeros((steps, len(MEASURES)))
        self.events: set[str] = set()
        self._process = psutil.Process()
        self._last = self._clocks()

    def on_train_start(self, state: grpo_cli.TrainState) -> None:
        self.events.add("start")
        self._last = self._clocks()

    def on_step_end(self, state: grpo_cli.TrainState) -> None:
        wall_s, cpu_s = now = self._clocks()
        children = self._process.children(recursive=True)
        child_bytes = 0
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child_bytes += child.memory_info().rss
        self.rows[state.step - 1] = (
            self._process.memory_info().rss / 1024,
            child_bytes / 1024,
            sys.getallocatedblocks(),
            self._process.num_fds(),
            self._process.num_threads(),
            len(children),
            1000 * (cpu_s - self._last[1]),
            1000 * (wall_s - self._last[0]),
        )
        self._last = now

    def on_evaluate(self, state: grpo_cli.TrainState) -> None:
        self.events.add("evaluate")

    def on_checkpoint(self, state: grpo_cli.TrainState) -> None:
        self.events.add("checkpoint")

    def on_train_end(self, state: grpo_cli.TrainState) -> None:
        self.events.add("end")

    def _clocks(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def recipe_for(model: Path, folder: Path, system: str, steps: int) -> dict[str, Any]:
    """A recipe whose files are in `folder`; a step's work is the same from the first to the last."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "question {i}:", "answer": "{i}"}}\n' for i in range(10, 50)))
    return {
        "model": {"name": str(model), **SYSTEMS[system]},
        "data": {"name": str(prompts), "eval": {"name": str(prompts), "limit": 4}},
        "rewards": [
            "tests.soak.rewards:plain",
            {"path": "tests.soak.rewards:on_workers", "workers": 2},
            {"path": "tests.soak.rewards:within_time", "timeout_s": 60},
            {"path": "tests.soak.rewards:on_the_loop", "timeout_s": 60},
            {"path": "tests.soak.rewards:apart", "isolate": True, "timeout_s": 60, "on_error": "none"},
        ],
        "generation": {"num_generations": 4, "max_completion_tokens": 8, "top_p": 0.95, "stop": ["~~"]},
        "loss": {
            "beta": 0.05,
            "entropy_coef": 0.001,
            "top_entropy_quantile": 0.8,
            "drop_zero_variance_groups": "resample",
        },
        "optim": {"learning_rate": 1e-5, "scheduler": "cosine", "warmup_ratio": 0.1},
        "train": {
            "output_dir": str(folder / "run"),
            "max_steps": steps,
            "prompts_per_step": 3,
            "optimizer_steps_per_rollout": 2,
            "num_iterations": 2,
            "save_every": 20,
            "keep_checkpoints": KEPT,
            "eval_every": 10,
        },
        "logging": {"print_completions": 10, "trackers": ["tensorboard"]},
    }


def soak(model: Path, folder: Path, system: str, steps: int) -> list[Trend]:
    """Train, and say what each measure did.

    Args:
        model: folder of the model.
        folder: an empty one, for the run, its prompts and its screen.
        system: of `SYSTEMS`.
        steps: at least 40.

    Raises:
        AssertionError: a feature did not come about.
    """
    watcher = Watcher(steps)
    with (folder / "screen.txt").open("w") as screen:
        grpo_cli.train(
            recipe_for(model, folder, system, steps), callbacks=[watcher], console=Console(file=screen, width=100)
        )
    _check_features(folder, watcher, steps)
    return [trend(measure, watcher.rows[:, index]) for index, measure in enumerate(MEASURES)]


def _check_features(folder: Path, watcher: Watcher, steps: int) -> None:
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    assert len(rows) == steps
    assert sum(row["resample/rounds"] > 0 for row in rows) > steps / 20
    assert sum("eval_reward" in row for row in rows) == steps // 10
    assert all(row["kl"] is not None for row in rows[1:])
    assert any(row["rewards/apart/mean"] is None for row in rows), "the isolated function never ended its process"
    assert watcher.events == {"start", "evaluate", "checkpoint", "end"}
    assert len(list((folder / "run").glob("checkpoint-*"))) == KEPT
    assert list((folder / "run").rglob("events.out.tfevents.*"))
    assert "completion" in (folder / "screen.txt").read_text()
