"""The process of an isolated reward function. Started as a script by `grpo_cli.reward.isolated`; never import it.

It forks. The parent stays behind as a supervisor that needs nothing of the function: it waits until the worker
or the trainer ends, kills what is left, on Linux also what left its session, and says how the worker ended. The
worker limits its memory, finds the function and calls it, once for each request. Requests are pickles behind
their length. Replies are lines of JSON, so that what a broken process writes is data to the trainer at most.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from grpo_cli.reward.registry import RewardFunction

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    # A scheduler sends these to every process of a job; they are for the trainer, which may want one more call.
    # Not SIG_IGN, which the programs that the function starts would inherit.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    trainer = os.getppid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    worker = os.fork()
    if worker:
        _supervise(worker, trainer, connection)
    # The group that the supervisor kills.
    os.setpgid(0, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _work(connection)


def _work(connection: socket.socket) -> None:
    me = os.getpid()
    job = pickle.loads(_request(connection))
    sys.path[:] = job["sys_path"]
    if _LINUX:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        memory = job["memory_bytes"] if hard == resource.RLIM_INFINITY else min(job["memory_bytes"], hard)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    from grpo_cli.errors import UserError
    from grpo_cli.recipe.schema import RewardConfig
    from grpo_cli.reward.registry import resolve_reward

    config = RewardConfig(path=job["path"], params=job["params"])
    try:
        function = resolve_reward(config, job["setting"])
    except UserError as error:
        _reply(connection, {"refused": str(error)})
        return
    accepts = None if function.accepts is None else sorted(function.accepts)
    _reply(connection, {"accepts": accepts, "required": sorted(function.required)})
    while True:
        reply = _called(function, _request(connection))
        if os.getpid() != me:
            # The function forked, and this is the copy.
            os._exit(0)
        _reply(connection, reply)


def _called(function: RewardFunction, request: bytes) -> dict[str, Any]:
    """Make one call and return what is to be told about it."""
    import inspect
    import math

    from grpo_cli.reward.hooks import CallLog
    from grpo_cli.reward.scorer import described
    from grpo_cli.reward.values import Unusable, checked_values

    try:
        arguments = pickle.loads(request)
        count = len(arguments["completions"])
        log = CallLog(count)
        offered = arguments | {"log_extra": log.log_extra, "log_metric": log.log_metric}
        result = function.call(
            **{
                name: value
                for name, value in offered.items()
                if function.accepts is None or name in function.accepts
            }
        )
        if inspect.isawaitable(result):
            result = _event_loop().run_until_complete(result)
        values = checked_values(result, count)
    except Unusable as error:
        return {"unusable": [str(error), error.index]}
    except BaseException as error:  # SystemExit too: a completion that is run may call exit()
        # Memory that leaked stays with the process.
        return {"failed": f"raised {described(error)}", "spent": isinstance(error, MemoryError)}
    numbers = [None if math.isnan(value) else value for value in values]
    return {"values": numbers, "extras": log.extras, "metrics": log.metrics}


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The one event loop, to which a client that the function keeps belongs."""
    import asyncio  # not at the top: the supervisor stays small

    return asyncio.new_event_loop()


def _request(connection: socket.socket) -> bytes:
    """The next request; ends the process when there will be none."""
    (length,) = struct.unpack("!Q", _read(connection, 8))
    return _read(connection, length)


def _read(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        chunk = connection.recv(min(length - len(parts), 1 << 20))
        if not chunk:
            os._exit(0)
        parts += chunk
    return bytes(parts)


def _reply(connection: socket.socket, reply: dict[str, Any]) -> None:
    connection.sendall(json.dumps(reply).encode() + b"\n")


def _supervise(worker: int, trainer: int, connection: socket.socket) -> None:
    """Wait for the worker's end or the trainer's, kill what is left, and say how the worker ended."""
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    os.set_blocking(wake_reader, False)
    signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(connection, 0)  # only whether the other end is closed
    poll.register(wake_reader, select.POLLIN)
    status = None
    while True:
        with suppress(ChildProcessError):
            ended, its_status = os.waitpid(worker, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(its_status)
                break
        # The second: a process that the trainer forked may hold the other end open.
        if any(descriptor == connection.fileno() for descriptor, _ in poll.poll(1000)) or os.getppid() != trainer:
            break
        with suppress(BlockingIOError):
            os.read(wake_reader, 4096)
    with suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)
    _kill_descendants()
    with suppress(OSError):
        connection.sendall(b"\n" + json.dumps({"ended": status}).encode() + b"\n")
    os._exit(0)


def _kill_descendants(patience_s: float = 2.0) -> None:
    """Kill children until none is left. Those of the killed become ours: every generation gets its turn."""
    me, end = os.getpid(), time.monotonic() + patience_s
    while time.monotonic() < end:
        with suppress(OSError), open(f"/proc/self/task/{me}/children") as file:
            for child in file.read().split():
                with suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _prctl(option: int, value: int) -> None:
    if _LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
