"""Calls a reward function in a process of its own, which can be stopped, crash and be replaced. No torch import.

One process makes one call at a time; calls from several threads get a process each. It is started with a fresh
interpreter, because a copy of a trainer that has threads and a GPU is not safe to run. The other half, which runs
inside that process, is `isolated_child.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from grpo_cli.errors import UserError
from grpo_cli.reward.values import Unusable

CHILD = Path(__file__).with_name("isolated_child.py")

START_S = 600.0
"""Longest time from the start of the interpreter until the function is there: a class may load a model."""

MEMORY_SHARE = 0.25
"""Of the machine's memory, or of what the job may use of it, for all processes of a function."""

LEAST_MEMORY_BYTES = 1024**3
"""For each process, however little the machine has."""


class IsolatedFailure(Exception):
    """What happened to a call, in words that follow the function's name."""


class IsolatedTimeout(Exception):
    """A call took longer than it may, and its process was ended."""


class IsolatedFunction:
    """A reward function that is called in processes of its own. Threads may share it."""

    def __init__(
        self, path: str, params: Mapping[str, Any], *, timeout_s: float | None, memory_bytes: int, setting: str
    ) -> None:
        """Start the first process, which finds and makes the function.

        Args:
            path: `module:function`, or the short name of an installed reward function.
            params: its keyword arguments, of `__init__` for a class.
            timeout_s: longest time for one call. A process that starts takes its own time.
            memory_bytes: what each process may have.
            setting: where the recipe names it, for messages.

        Raises:
            UserError: there is no such function, or it does not take its `params`.
        """
        self._job = {"path": path, "params": dict(params), "memory_bytes": memory_bytes, "setting": setting}
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        first = _Process(self._job)
        described = first.hello()
        if "refused" in described:
            first.end()
            raise UserError(described["refused"])
        self.accepts: frozenset[str] | None = (
            None if described["accepts"] is None else frozenset(described["accepts"])
        )
        """Names of the keyword arguments it takes; None when it has **kwargs."""
        self.required = frozenset(described["required"])
        """Names of the keyword arguments without a default."""
        self._idle.append(first)

    def __call__(self, **arguments: Any) -> list[float | None]:
        """Call it.

        Raises:
            IsolatedFailure: it raised, or its process ended.
            IsolatedTimeout: it took too long.
            Unusable: it returned something that is not one number or None per completion.
        """
        log_extra: Any = arguments.pop("log_extra", None)
        log_metric: Any = arguments.pop("log_metric", None)
        request = pickle.dumps(arguments, pickle.HIGHEST_PROTOCOL)
        process = self._idle_process() or self._new_process()
        kept = False
        try:
            reply = process.ask(request, self._timeout_s)
            kept = not reply.get("spent", False)
        finally:
            if kept:
                with self._lock:
                    self._idle.append(process)
            else:
                process.end()
        if "unusable" in reply:
            raise Unusable(*reply["unusable"])
        if "failed" in reply:
            raise IsolatedFailure(reply["failed"])
        # Only what the function takes, and so was offered, has been used there.
        for column, values in reply["extras"].items():
            log_extra(column, values)
        for name, value in reply["metrics"]:
            log_metric(name, value)
        return reply["values"]

    def _idle_process(self) -> _Process | None:
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None or process.alive():
                return process
            # It ended while it waited, perhaps by a kernel short of memory: not this call's fault.
            process.end()

    def _new_process(self) -> _Process:
        process = _Process(self._job)
        described = process.hello()
        if "refused" in described:
            process.end()
            raise IsolatedFailure(f"could not start again: {described['refused']}")
        return process


class _Process:
    """One process, for one call at a time. It ends when this end of the connection does, however that happens."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._shown = f"{job['setting']}: {job['path']} cannot be called apart"
        self._connection, other_end = socket.socketpair()
        self._unread = bytearray()
        with other_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), str(other_end.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(other_end.fileno(),),
                # Ctrl-C at the terminal is for the trainer.
                start_new_session=True,
            )
        path = [os.path.abspath(folder) for folder in sys.path]
        self._send(pickle.dumps({**job, "sys_path": path}))

    def hello(self) -> dict[str, Any]:
        """What it says about the function once it is there, or why it is not."""
        try:
            reply = self._receive(time.monotonic() + START_S)
        except TimeoutError:
            return {"refused": f"{self._shown}: its process was not ready within {START_S:g} seconds"}
        if "ended" in reply:
            return {"refused": f"{self._shown}: its process {_end(reply['ended'])} as it started"}
        return reply

    def ask(self, request: bytes, timeout_s: float | None) -> dict[str, Any]:
        """Make one call.

        Raises:
            IsolatedTimeout: there was no answer in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            self._connection.settimeout(timeout_s)
            with suppress(BrokenPipeError, ConnectionResetError):
                self._send(request)
            reply = self._receive(deadline)
        except TimeoutError as error:
            raise IsolatedTimeout from error
        return {"failed": f"its process {_end(reply['ended'])}", "spent": True} if "ended" in reply else reply

    def alive(self) -> bool:
        """Whether it waits for a call. One that has something to say has ended."""
        self._connection.setblocking(False)
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self._process.poll() is None
        except ConnectionResetError:
            return False
        return False

    def end(self) -> None:
        """End it and whatever it started."""
        # Closing is not enough where this process was forked and another one has the connection too.
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: bytes) -> None:
        self._connection.sendall(struct.pack("!Q", len(message)) + message)

    def _receive(self, deadline: float | None) -> dict[str, Any]:
        """The next line that makes sense. What a dying process wrote half is followed by one that says so."""
        searched = 0  # bytes without a line's end: what is logged can be long
        while True:
            end = self._unread.find(b"\n", searched)
            if end >= 0:
                line = bytes(self._unread[:end])
                del self._unread[: end + 1]
                searched = 0
                with suppress(ValueError):
                    return json.loads(line)
                continue
            searched = len(self._unread)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self._connection.settimeout(left)
            try:
                chunk = self._connection.recv(65536)
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                return {"ended": None}
            self._unread += chunk


def memory_for(workers: int) -> int:
    """Bytes for each process of a function with that many workers on each of the machine's ranks."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = max(1, workers) * (int(ranks) if ranks.isdecimal() and int(ranks) else 1)
    return max(LEAST_MEMORY_BYTES, int(MEMORY_SHARE * _usable_memory() / processes))


def _usable_memory() -> int:
    """Bytes of the machine, or of the control group that this process is in."""
    limits = [psutil.virtual_memory().total]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = Path("/sys/fs/cgroup", next(line for line in lines if line.startswith("0::"))[4:])
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):
                limits.append(int((folder / "memory.max").read_text()))
    return min(limits)


def _end(code: int | None) -> str:
    if code is None:
        return "was killed"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}"
