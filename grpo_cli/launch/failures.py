"""How the failure of a worker becomes one message and one exit code.

A worker writes its error into the file that torch's elastic agent has named for it. The launcher reads the files
of all workers, picks the error that brought down the others, and ends with it. Never imports torch: every
`grpo train` passes through here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from grpo_cli.distributed.environment import LAUNCHER_PID, Nodes, is_launched, placement
from grpo_cli.errors import EXPECTED_ERRORS, RunError, StoppedEarly, UserError

EXIT_FAILED, EXIT_USAGE, EXIT_REQUEUE = 1, 2, 75

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

AGENT_GRACE_S = 30
"""Time that torch's agent gives workers between SIGTERM and SIGKILL; it is fixed there."""

CAUSE_FIRST_S = 3
"""How long a worker waits that ends only because another one is gone. The agent stops all workers when the first
ends, and the one that is the cause may not have written its error yet."""

PR_SET_PDEATHSIG = 1

LOST_CONTACT = re.compile(
    r"gloo|Connection (closed|reset) by peer|Broken pipe|ncclRemoteError|ncclSystemError|remote process exited"
    r"|NCCL communicator was aborted|store.*(timeout|timed out)",
    re.IGNORECASE,
)
"""What the errors of a collective say whose other side is gone."""


def exit_code(error: BaseException) -> int:
    """The exit code that goes with an error."""
    if isinstance(error, StoppedEarly):
        return EXIT_REQUEUE
    return EXIT_USAGE if isinstance(error, UserError) else EXIT_FAILED


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Around all that a worker does: report an error to the launcher, print it at most once, end the process.

    Does nothing in a process that no launcher started.
    """
    if not is_launched(os.environ):
        yield
        return
    _end_with_launcher()
    try:
        yield
    except KeyboardInterrupt:
        # Ends as any other signal does, so that the launcher sees which one it was.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception as error:
        code = exit_code(error)
        report(error, code)
        rank = placement(os.environ).rank
        if is_consequence(error):
            time.sleep(CAUSE_FIRST_S)
        elif not isinstance(error, EXPECTED_ERRORS):
            trace = "".join(traceback.format_exception(error))
            _print(f"rank {rank} ({socket.gethostname()}, pid {os.getpid()}):\n{trace}")
        elif LAUNCHER_PID not in os.environ and rank == 0:
            _print(f"{error}\n")
        sys.exit(code)


def report(error: BaseException, code: int) -> None:
    """Tell the launcher why this worker is about to end.

    Args:
        error: what ends the process.
        code: the exit code that it ends with.
    """
    for number in STOP_SIGNALS:  # whoever ends need not be told to, and the exit code shall stay this one
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(number, signal.SIG_IGN)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    summary = " ".join("".join(traceback.format_exception_only(error)).split())
    message = {
        "message": str(error) if isinstance(error, EXPECTED_ERRORS) else summary,
        "errorCode": code,
        "expected": isinstance(error, EXPECTED_ERRORS),
        "consequence": is_consequence(error),
        "extraInfo": {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": time.time()},
    }
    # torch's agent fails on a file that is not whole.
    partial = Path(f"{file}.partial")
    with contextlib.suppress(OSError):  # where nobody reads it any more, the exit code has to do
        partial.write_text(json.dumps({"message": message}), encoding="utf-8")
        partial.replace(file)


def is_consequence(error: BaseException) -> bool:
    """Whether `error` only says that another process is gone or no longer answers."""
    if isinstance(error, EXPECTED_ERRORS) or not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    in_collective = bool(frames) and "/torch/distributed/" in frames[-1].filename
    return in_collective or LOST_CONTACT.search(str(error)) is not None


def raise_outcome(failures: Mapping[int, Any], nodes: Nodes, received: Collection[int]) -> NoReturn:
    """End the launcher as the worker ended that failed first.

    Args:
        failures: torch's `ProcessFailure` of each rank of this machine that did not end with 0.
        nodes: the machines that train together.
        received: numbers of the signals that were forwarded to the workers.

    Raises:
        UserError, RunError, StoppedEarly: with the message for the user.
        SystemExit: with the exit code alone, where another machine's launcher prints the message.
    """
    rank, failure = root_cause(failures)
    told = failure.message if isinstance(failure.message, dict) else {}
    if told.get("expected"):
        if failure.exitcode == EXIT_REQUEUE and nodes.index > 0:
            raise SystemExit(EXIT_REQUEUE)
        kinds = {EXIT_USAGE: UserError, EXIT_REQUEUE: StoppedEarly}
        raise kinds.get(failure.exitcode, RunError)(told["message"])
    if -failure.exitcode in received:
        raise RunError(f"stopped at once by {failure.signal_name()}; --resume goes on from the last checkpoint")
    where = f"rank {rank} ({socket.gethostname()}, pid {failure.pid})"
    if failure.exitcode < 0:
        hint = "; the machine may have run out of memory" if failure.exitcode == -signal.SIGKILL else ""
        raise RunError(f"{where} was killed by {failure.signal_name()}{hint}")
    if not told:
        raise RunError(f"{where} ended with exit code {failure.exitcode}; what it printed above may say why")
    if told["consequence"]:
        _print(told["extraInfo"]["py_callstack"])
        if nodes.count > 1:
            where += " lost another process, and other nodes may tell why; it"
    raise RunError(f"{where} failed: {told['message']}")


def root_cause(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The rank whose failure brought down the others, and that failure."""
    first = min(failure.timestamp for failure in failures.values())

    def order(item: tuple[int, Any]) -> tuple[int, float, int]:
        rank, failure = item
        told = failure.message if isinstance(failure.message, dict) else None
        late_kill = failure.exitcode == -signal.SIGKILL and failure.timestamp - first >= AGENT_GRACE_S - 5
        if failure.exitcode == -signal.SIGTERM or late_kill:
            kind = 4  # by the agent, after the first failure
        elif failure.exitcode == -signal.SIGABRT:
            kind = 2  # NCCL aborts a process that lost another
        elif failure.exitcode < 0:
            kind = 0
        else:
            kind = 3 if told is not None and told["consequence"] else 1
        return kind, told["extraInfo"]["timestamp"] if told else failure.timestamp, rank

    return min(failures.items(), key=order)


def _end_with_launcher() -> None:
    """Have the kernel kill this worker when our launcher ends, however it ends.

    A thread of ours could not do it: a worker that hangs in a collective may run no Python at all.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(launcher):  # it went before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def _print(text: str) -> None:
    """One write, so that what several processes print does not mix."""
    sys.stderr.write(text)
    sys.stderr.flush()
