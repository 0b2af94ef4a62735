r"""Asks math-verify whether an answer is right, from any thread, and never waits longer than it said.

math-verify's own timeouts are signals, which work in the main thread only. Without them `\boxed{((((...`
with 1,000 brackets parses for 6 s, and the comparison of `9^{9^{9^9}}` has no end: a bound on the length
alone does not help. So it runs in child processes that are killed when their time is over. They are started
once (0.7 s, the import of SymPy) and kept: a question then costs 1 ms for a number, about 25 ms for LaTeX.
A process pool of the standard library will not do, because it can neither kill one worker nor be started
safely from a program that has threads and a GPU.

The other half, which runs inside the child processes, is `math_judge_child.py`.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_CHILD = Path(__file__).with_name("math_judge_child.py")

# Importing SymPy from a cold shared disk is slow, and not the answer's fault.
_START_S = 120.0
# Answers stand at the end. math-verify takes 0.4 s for 4,000 single digits, and quadratically more.
MAX_CHARACTERS = 8_000


class MathJudge:
    """A few child processes that run math-verify, started when first needed. Threads may share it."""

    _idle: list[_Worker]

    def __init__(self, workers: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._workers = workers
        self.forget()

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return for each pair (ground truth, completion) whether the completion's answer is right.

        What cannot be decided within the timeout, or within the memory of a child process, is not right.

        Raises:
            ImportError: math-verify is not installed.
            RuntimeError: a child process could not start.
        """
        if not pairs:
            return []
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("this reward needs math-verify: pip install 'math-verify[antlr4_13_2]'")
        with ThreadPoolExecutor(min(self._workers, len(pairs))) as pool:
            return list(pool.map(self._judge_one, pairs))

    def close(self) -> None:
        """End the child processes that are idle; a later question starts new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    def forget(self) -> None:
        """Drop the child processes without ending them: after a fork they are the other process's."""
        # New locks as well: another thread may have held the old ones at the moment of the fork.
        self._slots = threading.BoundedSemaphore(self._workers)
        self._lock = threading.Lock()
        self._idle = []

    def _judge_one(self, pair: tuple[str, str]) -> bool:
        truth, completion = pair
        with self._slots:
            worker = self._take_idle() or _Worker(self._timeout_s)
            verdict = worker.ask(truth, completion[-MAX_CHARACTERS:])
            if verdict is None:
                worker.kill()
                return False
            with self._lock:
                self._idle.append(worker)
            return verdict

    def _take_idle(self) -> _Worker | None:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive():
                    return worker
                # Ended while it waited, perhaps by a kernel short of memory: not this answer's fault.
                worker.kill()
        return None


class _Worker:
    """One child process, for one question at a time."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        with tempfile.TemporaryFile() as complaints:
            self._process = subprocess.Popen(
                # -P: else the folder of the script, this one, would come before the standard library.
                [sys.executable, "-P", str(_CHILD), str(math.ceil(timeout_s) + 1)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                # Ctrl-C at the terminal is for the trainer.
                start_new_session=True,
            )
            if self._read_line(_START_S) != b"ready":
                self.kill()
                complaints.seek(0)
                said = complaints.read()[-2000:].decode(errors="replace").strip()
                raise RuntimeError(f"math-verify did not start within {_START_S:g} s: {said or 'it said nothing'}")

    def ask(self, truth: str, completion: str) -> bool | None:
        """Return the verdict; None if the child died of the question or is still at it: then kill it."""
        assert self._process.stdin is not None
        question = json.dumps([truth, completion]).encode() + b"\n"
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = self._read_line(self._timeout_s)
        return None if answer is None else answer == b"true"

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        # What a dead process did not read is still in the buffer, and close() would write it.
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read_line(self, timeout_s: float) -> bytes | None:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                chunk = os.read(self._process.stdout.fileno(), 4096)
                if not chunk:
                    return None
                line += chunk
        return line.strip()


def usable_cores() -> int:
    """Return how many CPU cores this process may use: on a shared node fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


shared_judge = MathJudge(workers=min(4, usable_cores()), timeout_s=5.0)
atexit.register(shared_judge.close)
os.register_at_fork(after_in_child=shared_judge.forget)
