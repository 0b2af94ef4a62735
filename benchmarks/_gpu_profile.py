"""The profile part of `benchmarks.gpu`: where the host waits for the device in one training step, and the kernels.

Two steps are looked at, one for each question: torch warns at every call that waits, which tells the source lines,
and the profiler counts calls of the CUDA runtime and times kernels.
"""

from __future__ import annotations

import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._gpu_results import ROOT, Finding, Part
from benchmarks._gpu_runs import make_run, train, wait_for

WAITS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
)
"""Calls, as the profiler names them, after which the host has waited; some are made of others."""
WARNING = "called a synchronizing CUDA operation"
SHOWN = 20
"""Lines and kernels."""
OWN = ("grpo_cli/", "rewards/")


def own_line(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of ours, and beside it the innermost of all where that is another's."""
    known = [frame for frame in stack if frame.filename not in (__file__, warnings.__file__)]
    ours = [frame for frame in known if _shown(frame).startswith(OWN)]
    if not ours:
        return _shown(known[-1]) if known else "unknown"
    return _shown(ours[-1]) + ("" if ours[-1] is known[-1] else f" in {_shown(known[-1])}")


def _shown(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    if path.is_relative_to(ROOT):
        return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return f"{'/'.join(path.parts[-2:])}:{frame.lineno} {frame.name}"


class SyncCounter:
    """Counts torch's warnings of waits by source line while it is on."""

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        self._caught: Any = None

    def start(self) -> None:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._count

    def stop(self) -> None:
        self._caught.__exit__(None, None, None)

    def _count(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if WARNING in str(message):
            self.lines[own_line(traceback.extract_stack()[:-1])] += 1


class Watch:
    """Callback of the training loop: a step to warm up, one that warns of waits, and one under the profiler.

    Each lasts from the end of the step before to its own end; compilers have done their work by then.
    """

    WARM_UP = 2

    def __init__(self, device: str) -> None:
        import torch

        self.device = device
        self.waits = SyncCounter()
        self.seconds = {"plain": 0.0, "profiled": 0.0}
        self._start = 0.0
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
        self.profiler = torch.profiler.profile(activities=activities)

    def on_step_end(self, state: Any) -> None:
        wait_for(self.device)
        now = time.perf_counter()
        step = state.step - self.WARM_UP
        if step == 1:
            self.seconds["plain"] = now - self._start
            self._warn(True)
        elif step == 2:
            self._warn(False)
            self.profiler.start()
        elif step == 3:
            self.seconds["profiled"] = now - self._start
            self.profiler.stop()
        self._start = time.perf_counter()

    def _warn(self, on: bool) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn" if on else "default")
        (self.waits.start if on else self.waits.stop)()


def is_kernel(event: Any) -> bool:
    """Whether the profiler's event is work of the device itself, not the span of a named region on it."""
    return "CUDA" in str(event.device_type) and not getattr(event, "is_user_annotation", False)


def wait_rows(events: Iterable[Any], lines: Counter[str]) -> list[list[str]]:
    """Calls that wait, by name, then by source line."""
    calls = {event.key: event.count for event in events if not is_kernel(event)}
    rows = [["call", name, str(calls.get(name, 0)), "", ""] for name in WAITS]
    rows += [["waits by line", line, str(count), "", ""] for line, count in lines.most_common(SHOWN)]
    left = lines.total() - sum(count for _, count in lines.most_common(SHOWN))
    return [*rows, ["waits by line", "all others", str(left), "", ""]] if left else rows


def kernel_rows(events: Iterable[Any], name: str, seconds: Callable[[Any], float]) -> list[list[str]]:
    """The longest of some events."""
    longest = sorted(events, key=seconds, reverse=True)
    total = sum(map(seconds, longest))
    return [
        [name, event.key.replace("|", "/")[:90], str(event.count), f"{1e3 * seconds(event):.2f}",
         f"{seconds(event) / total:.1%}" if total else ""]
        for event in longest[:SHOWN]
    ]  # fmt: skip


def recipe(group_size: int, completion: int, prompts: int, folder: str) -> dict[str, Any]:
    return {
        "generation": {"num_generations": group_size, "max_completion_tokens": completion},
        "train": {
            "output_dir": folder,
            "max_steps": Watch.WARM_UP + 3,
            "prompts_per_step": prompts,
            "save_every": 0,
        },
        "logging": {"trackers": []},
    }


def run(piece: str, device: str, rehearse: bool) -> Finding:
    name, prompt, completion, prompts, group_size = (
        ("random-tiny", 24, 8, 2, 4) if rehearse else ("random-qwen2.5-0.5b", 1024, 128, 8, 8)
    )
    watch = Watch(device)
    with tempfile.TemporaryDirectory() as folder:
        sections = recipe(group_size, completion, prompts, f"{folder}/run")
        train(make_run(name, device, sections, prompts=prompts, prompt=prompt, callbacks=[watch]))
    events = list(watch.profiler.key_averages())
    rows = wait_rows(events, watch.waits.lines)
    kernels = [event for event in events if is_kernel(event)]
    if device == "cuda":
        rows += kernel_rows(kernels, "kernel", lambda event: event.self_device_time_total / 1e6)
    else:
        rows += kernel_rows(events, "operation", lambda event: event.self_cpu_time_total / 1e6)
    plain, profiled = watch.seconds["plain"], watch.seconds["profiled"]
    notes = [f"The step takes {plain:.2f} s, {profiled:.2f} s under the profiler."]
    if kernels:
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        notes.append(f"Kernels and copies run for {busy:.2f} s of it: {busy / plain:.0%}.")
    notes.append(f"torch warned of {watch.waits.lines.total()} waits.")
    return Finding(rows, notes=notes)


ABOUT = """
A whole step of Qwen2.5-0.5B, 8 prompts of 1024 tokens × 8 completions of 128, generated and trained on. Calls
are those of the profiler; lines are where `torch.cuda.set_sync_debug_mode` warns that the host waits for the
device, counted in a step of their own.
"""

PART = Part(
    name="profile",
    title="Where a step waits",
    about=ABOUT,
    columns=("what", "where", "count", "ms", "of all"),
    limit_s=300,
    pieces=("qwen2.5-0.5b-1024x128-g8",),
    rehearsed=("tiny",),
    run=run,
)
