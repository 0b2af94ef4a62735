"""Where a run can be hit, and by what; this part runs in the process that is hit.

A point is a function of the run. Each of its calls has two moments, just before and just after; the n-th moment of
a point is the same one whenever the same run is started again, so that a fault is repeated by its name and number.
Where several threads come by, as in environments, which of their calls is the n-th is not always the same. A later
capability adds its point by a line in `POINTS`.
"""

from __future__ import annotations

import builtins
import errno
import functools
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from grpo_cli import cli
from tests.faults.disk import Watch

POINTS = {
    "environment reset": "tests.episode.small_talk:SmallTalk.reset",
    "environment answer": "tests.episode.small_talk:SmallTalk.respond",
    "turn": "grpo_cli.episode.driver:Play.sampled",
    "generation": "grpo_cli.episode.driver:Driver.generate",
    "sampled token": "grpo_cli.rollout.embedded.batch:Batch.append",
    "scoring": "grpo_cli.reward.scorer:Scorer.score_and_log",
    "forward": "grpo_cli.train.learner:Learner.logprobs",
    "backward": "grpo_cli.train.learner:Learner.backward",
    "optimizer step": "grpo_cli.train.learner:Learner.step",
    "evaluation": "grpo_cli.train.rollouts:Rollouts.evaluate",
    "completions": "grpo_cli.train.recorder:save_completions",
    "metrics": "grpo_cli.train.metrics:MetricsFile.append",
    "tensorboard": "grpo_cli.train.trackers:Trackers.log",
    "checkpoint": "grpo_cli.train.recorder:save_checkpoint",
    "weights": "grpo_cli.train.checkpoint:save_weights",
    "torch.save": "torch:save",
    "resume": "grpo_cli.train.recorder:load_checkpoint",
    "final": "grpo_cli.train.api:save_final",
    "open to write": "io:open",
    "mkdir": "os:mkdir",
    "fsync": "os:fsync",
    "rename": "os:rename",
    "replace": "os:replace",
    "unlink": "os:unlink",
    "rmdir": "os:rmdir",
    "any call": "",
}
"""Name of a point to the function, as `module:name` where it is looked up. "any call" is each call of any Python
function of the main thread, wherever it is."""

SERVER_POINTS = {
    "server request": "grpo_cli.rollout.server.connection:ServerConnection._call",
    "server start": "grpo_cli.rollout.server.spawned_server:SpawnedServer.ensure_running",
    "weights to server": "grpo_cli.rollout.server.connection:fill_memory",
}
"""Points of a run that generates on a server of its own. Requests come from several threads: which of them is the
n-th is not always the same."""

TORN_WRITE = "torn write"
"""The next file that grows beyond some size ends the process in the middle of that write."""

POWER_LOSS = "power loss"
"""SIGKILL for all processes, after which the disk has forgotten what was not synced."""

KILLS = ("SIGKILL", "SIGTERM", POWER_LOSS, "SIGUSR1", TORN_WRITE)
"""What a run is stopped by."""

SERVER_KILLS = ("server killed", "engine killed")
"""SIGKILL for the server that the process has started, or for the process of its engine; the trainer lives on."""


@dataclass(frozen=True)
class Fault:
    """What happens to one process of a run."""

    point: str
    moment: int
    """Of the point, counted from 1: odd ones are before a call, even ones after it."""
    by: str
    """One of `KILLS` or `SERVER_KILLS`, the name of an errno, or `folder deleted`."""
    tear: int = 0
    """Bytes that a file may still have, for a torn write."""

    def __str__(self) -> str:
        when = "before" if self.moment % 2 else "after"
        return f"{self.by} {when} call {(self.moment + 1) // 2} of {self.point}"


@dataclass(frozen=True)
class Plan:
    """What a process does beside training."""

    run: Path
    """Folder of the run."""
    notes: Path
    """Folder in which it says what has happened."""
    fault: Fault | None = None
    watches_disk: bool = False
    counts: bool = False
    """Write the number of moments of every point."""
    clock_goes_back: bool = False


def run_with(plan: Plan) -> None:
    """The command line, as `grpo` runs it, with a fault."""
    if plan.clock_goes_back:
        _turn_back_the_clock()
    if plan.watches_disk:
        Watch(plan.run, plan.notes).begin()
    moments: Counter[str] = Counter()
    fault = plan.fault
    if fault is not None and fault.by == TORN_WRITE:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it

    def pass_by(point: str, *arguments: Any) -> None:
        moments[point] += 1
        if fault is not None and moments[point] == fault.moment:
            _strike(fault, plan, [argument for argument in arguments if isinstance(argument, str | bytes | Path)])

    for point in POINTS | SERVER_POINTS if fault is None else [fault.point]:
        if fault is not None or plan.counts:
            _watch(point, pass_by)
    try:
        cli.main()
    finally:
        sys.setprofile(None)
        if plan.counts:
            (plan.notes / f"moments-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(moments))


def _strike(fault: Fault, plan: Plan, files: Sequence[str | bytes | Path]) -> None:
    if fault.by in SERVER_KILLS:
        _kill_server(fault.by == "engine killed", plan.notes / "struck")
        return
    (plan.notes / "struck").touch()
    if fault.by in ("SIGKILL", POWER_LOSS):
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.by == TORN_WRITE:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.tear, fault.tear))
    elif fault.by == "folder deleted":
        shutil.rmtree(plan.run)
    elif fault.by in errno.errorcode.values():
        number = getattr(errno, fault.by)
        raise OSError(number, os.strerror(number), *map(os.fsdecode, files[:1]))
    else:
        os.kill(os.getpid(), signal.Signals[fault.by])


def _kill_server(engine_only: bool, struck: Path) -> None:
    """Kill this process's server, or its engine, if it has come so far."""
    for server in psutil.Process().children():
        engines = [child for child in server.children() if "EngineCore" in " ".join(child.cmdline())]
        for process in engines if engine_only else [server] if "serve" in server.cmdline() else []:
            struck.touch()
            process.kill()


def _watch(point: str, pass_by: Callable[..., None]) -> None:
    """Have `pass_by` called before and after each call of a point's function."""
    if point == "any call":

        def profile(frame: Any, event: str, argument: Any) -> None:
            if event == "call":
                pass_by(point)

        sys.setprofile(profile)
        return
    module, _, path = (POINTS | SERVER_POINTS)[point].partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    @functools.wraps(function)
    def watched(*arguments: Any, **options: Any) -> Any:
        if point == "open to write" and not _writes(*arguments, **options):
            return function(*arguments, **options)
        pass_by(point, *arguments)
        result = function(*arguments, **options)
        pass_by(point, *arguments)
        return result

    setattr(owner, name, watched)
    if point == "open to write":
        builtins.open = watched


def _writes(file: Any, mode: str = "r", *rest: Any, **options: Any) -> bool:
    return mode[0] in "wax"


def _turn_back_the_clock() -> None:
    """Have the wall clock go back by an hour at every look."""
    now = time.time
    looks = iter(range(1, 1 << 30))
    time.time = lambda: now() - 3600.0 * next(looks)
