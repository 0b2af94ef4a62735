"""Turns a request to stop into a checkpoint between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from grpo_cli.distributed.environment import is_launched, placement
from grpo_cli.launch.failures import STOP_SIGNALS

ECHO_S = 2.0
"""A signal to a whole Slurm step reaches a worker itself and through its launcher: within this time it is one."""


def compile_in_this_process() -> None:
    """Have torch compile GPU kernels in this process, not in one beside it, unless the environment says otherwise.

    A signal that reaches a whole group of processes, as Slurm's do, would end the one beside it, and the kernel
    that is needed next, before the checkpoint, would fail. Few kernels are compiled here, so they need not be
    several at a time. To be called before the first one is.
    """
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        import torch._inductor.config

        torch._inductor.config.compile_threads = 1


class StopRequest:
    """Context in which SIGINT, SIGTERM and SIGUSR1 only set `name`; a second one acts as it always does.

    In a worker of a launcher, the same one within `ECHO_S` is not a second one.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._echo_until = 0.0  # of time.monotonic()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.name is not None:
            if name != self.name or time.monotonic() > self._echo_until:
                self._restore()
                os.kill(os.getpid(), number)
            return
        self.name = name
        if placement(os.environ).rank == 0:
            print(f"{name}: stopping after this step, with a checkpoint; once more stops at once", file=sys.stderr)
        if is_launched(os.environ):
            self._echo_until = time.monotonic() + ECHO_S
        else:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
