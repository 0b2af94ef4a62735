"""Runs Python that a model wrote, in a child process with limits, and in a world of its own where that can be had.

Where bubblewrap is installed and works, the code has no network, no files but those that Python needs, which it
cannot change, none of your other processes, and a small file system in memory that is gone afterwards
(`rewards.bubblewrap`). What then stands between it and you is the Linux kernel.

Elsewhere there are limits only: on time, memory, processes, files and output, and on the environment. They stop
code that is careless: loops for ever, eats memory, prints without end, leaves processes behind, or ends early
with exit code 0. They are NOT a security boundary: the code runs as your user, so it can read the files that you
can read, write wherever you can, and use the network.

The other half, which runs inside the child process, is `sandbox_child.py`.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rewards.bubblewrap import SCRIPTS, WORKDIR, Bubblewrap, bubblewrap

logger = logging.getLogger("grpo_cli")

_CHILD = Path(__file__).with_name("sandbox_child.py")

# What the child may take beyond its own timeout: a cold interpreter on a shared disk starts slowly.
_START_AND_STOP_S = 60.0
# How often to look whether the child ended while something that escaped it still holds its output open.
_POLL_S = 0.05


@dataclass(frozen=True)
class RunResult:
    """How a run of `run_python` or `run_tests` ended."""

    exit_code: int
    """As `subprocess` counts: 0 is success, -N is death by signal N (-9 after a timeout)."""
    timed_out: bool
    """The wall-clock limit ended it."""
    output: str
    """The first `output_bytes` bytes of standard output and standard error together."""
    finished: bool = False
    """Every part of the source ran to its last line, which exit code 0 alone does not say."""

    @property
    def passed(self) -> bool:
        """The source ran to its end, in time, and the interpreter ended without an error."""
        return self.finished and self.exit_code == 0 and not self.timed_out


def run_python(
    source: str | Sequence[str], *, timeout_s: float = 6.0, memory_mb: int = 512, output_bytes: int = 65536
) -> RunResult:
    """Run Python source in a child process and return how it ended.

    Several sources are compiled one by one and run one after the other in the same `__main__`: no part can
    swallow the next in an open string, and a syntax error in any of them means that none runs.

    The child has:

    - The interpreter of this process with its installed packages, but not the folder or `PYTHON*` variables
      of this process (`-s -P` and an environment of our own: what `-I` does, except that the hash seed can
      be fixed, so that the order of a set, and with it the reward, is the same on every run).
    - Of the environment only PATH and LD_LIBRARY_PATH; HOME and TMPDIR are its working directory, which is
      temporary and removed afterwards; an empty standard input.
    - `memory_mb` of address space per process, hardly more CPU time than `timeout_s`, files of at most 16
      MiB, no core dump, 256 open files, and (where it does not run as root, whom Linux does not hold to it)
      64 more processes.
    - `timeout_s` seconds of wall-clock time once the interpreter has started. When they are over, or the
      program ends, every process that it started is killed, on Linux also those that left its session.
    - Where bubblewrap works, a world of its own; see `rewards.bubblewrap`.

    Output beyond `output_bytes` is read and thrown away, so that printing much changes no verdict and fills
    no memory.

    Raises:
        RuntimeError: the child process could not start.
    """
    parts = [source] if isinstance(source, str) else list(source)
    with _pipe() as (reader, writer):
        with _started(_job("alone", parts, timeout_s, memory_mb), writer) as child:
            writer.close()
            output = _read_until_end(child.process, reader, timeout_s + _START_AND_STOP_S, output_bytes)
        return child.result(output)


def run_tests(
    program: str,
    tests: Sequence[str],
    *,
    timeout_s: float = 6.0,
    memory_mb: int = 512,
    output_bytes: int = 65536,
) -> RunResult:
    """Run a program in one child process and its tests in another, and return how the tests ended.

    Both have the limits of `run_python`. The tests see the program's names as if they stood in one file. What
    its functions return crosses as data and is compared in the process of the tests, which the program does
    not share (`rewards.sandbox_crossing`); of the program's own objects the tests hold remote controls.

    Raises:
        RuntimeError: a child process could not start.
    """
    its_end, tests_end = socket.socketpair()
    with its_end, tests_end, _pipe() as (reader, writer):
        # The tests keep the time.
        job = _job("program", [program], timeout_s + 1.0, memory_mb, its_end.fileno())
        with _started(job, writer) as its_child:
            job = _job("tests", list(tests), timeout_s, memory_mb, tests_end.fileno())
            with _started(job, writer) as child:
                # Each hears of the other's end.
                its_end.close()
                tests_end.close()
                writer.close()
                output = _read_until_end(child.process, reader, timeout_s + _START_AND_STOP_S, output_bytes)
        its_child.result(output)
        return child.result(output)


def check_sandbox(sandbox: str) -> None:
    """Check what a recipe says about the sandbox; warn once where code will have limits only.

    Args:
        sandbox: `required` or `auto`.

    Raises:
        ValueError: it is neither, or `required` and bubblewrap does not work here.
    """
    if sandbox not in ("auto", "required"):
        raise ValueError(f"sandbox can be auto or required, not {sandbox!r}")
    isolation = bubblewrap()
    if isinstance(isolation, str) and sandbox == "required":
        raise ValueError(f"sandbox: required, but {isolation}; install it, or write sandbox: auto")
    if isinstance(isolation, str):
        _warn(isolation)


@functools.cache
def _warn(reason: str) -> None:
    logger.warning(
        "code from the model runs as your user, with limits on time and memory only: it can read and write your "
        f"files and use the network. {reason[:1].upper()}{reason[1:]}. With sandbox: required in the reward's "
        "params a run does not start without it"
    )


@dataclass(frozen=True)
class _ChildProcess:
    process: subprocess.Popen[bytes]
    reports: list[str]
    """What it told, once it has ended."""

    def result(self, output: bytes) -> RunResult:
        """How it ended."""
        text = output.decode(errors="replace")
        if "started" not in self.reports:
            raise RuntimeError(
                f"the sandbox could not start {sys.executable} within {_START_AND_STOP_S:g} s "
                f"(exit code {self.process.returncode}); it said: {text[-2000:].strip() or 'nothing'}"
            )
        codes = [int(line.removeprefix("exit ")) for line in self.reports if line.startswith("exit ")]
        # Without one the supervisor itself was killed.
        exit_code = codes[0] if codes else self.process.returncode or -signal.SIGKILL
        return RunResult(exit_code, "timed out" in self.reports, text, "finished" in self.reports)


def _job(
    role: str, parts: list[str], timeout_s: float, memory_mb: int, connection: int | None = None
) -> dict[str, Any]:
    return {
        "role": role,
        "parts": parts,
        "connection": connection,
        "timeout_s": timeout_s,
        "memory_bytes": memory_mb * 1024 * 1024,
        "cpu_s": math.ceil(timeout_s) + 1,
        "other_threads": 0 if os.getuid() == 0 else _threads_of_user(os.getuid()),
    }


@contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", 0) as reading, os.fdopen(writer, "wb", 0) as writing:
        yield reading, writing


@contextmanager
def _started(job: dict[str, Any], output: IO[bytes]) -> Iterator[_ChildProcess]:
    """A child process that does a job and writes to `output`. Nothing of it is left afterwards."""
    token = secrets.token_hex(16)
    isolation = bubblewrap()
    wrapped = None if isinstance(isolation, str) else isolation
    workdir = WORKDIR if wrapped else tempfile.mkdtemp(prefix="grpo-sandbox-")
    job = {**job, "token": token, "wrapped": bool(wrapped), "uid": wrapped.uid() if wrapped else None}
    try:
        with _pipe() as (reports, report_writer):
            with report_writer:
                process = _start(job, wrapped, workdir, output, report_writer.fileno())
            child = _ChildProcess(process, [])
            try:
                yield child
            finally:
                _stop(process)
                child.reports.extend(_read_reports(reports.fileno(), token))
    finally:
        if not wrapped:
            _remove(workdir)


def _start(
    job: dict[str, Any], wrapped: Bubblewrap | None, workdir: str, output: IO[bytes], report_writer: int
) -> subprocess.Popen[bytes]:
    script, before, folder = (
        (f"{SCRIPTS}/{_CHILD.name}", wrapped.command, None) if wrapped else (str(_CHILD), (), workdir)
    )
    # Everything the child must know goes in over standard input: on its command line, in its environment or
    # in its working directory, the code that it runs would find the token and the tests.
    with tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(job).encode())
        stdin.seek(0)
        return subprocess.Popen(
            [*before, sys.executable, "-s", "-P", "-B", "-X", "utf8", script, str(report_writer)],
            stdin=stdin,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=_environment(workdir),
            pass_fds=[report_writer, *([] if job["connection"] is None else [job["connection"]])],
            start_new_session=True,
        )


def _environment(workdir: str) -> dict[str, str]:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": workdir,
        "TMPDIR": workdir,
        "PYTHONHASHSEED": "0",
        # One thread each: numerical libraries reserve address space per core, more than the limit on a
        # large machine.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    # Interpreters from an HPC module may need it to start at all.
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _threads_of_user(uid: int) -> int:
    """Count the threads of a user's processes: what RLIMIT_NPROC is compared with."""
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _read_until_end(child: subprocess.Popen[bytes], reader: IO[bytes], patience_s: float, limit: int) -> bytes:
    """Read output until the child ends or patience does; keep the first `limit` bytes."""
    deadline = time.monotonic() + patience_s
    output = bytearray()
    # Not select(): it fails on descriptors above 1023, and a trainer may have that many.
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            ended = child.poll() is not None
            if selector.select(0 if ended else min(_POLL_S, left)):
                chunk = os.read(reader.fileno(), 65536)
                output += chunk[: limit - len(output)]
                # The program that is tested may go on printing when its tests have ended.
                if not chunk or (ended and len(output) >= limit):
                    break
            elif ended:
                return bytes(output)
    # A program may close its output and run on.
    with suppress(subprocess.TimeoutExpired):
        child.wait(max(0.0, deadline - time.monotonic()))
    return bytes(output)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Make sure that nothing of the child is left; it has usually ended by itself."""
    if child.poll() is None:
        # Asked to end, it kills what it started, which we may not be able to find.
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(2.0)
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _read_reports(reader: int, token: str) -> list[str]:
    """Return what came with the token, which the code that ran does not know."""
    os.set_blocking(reader, False)
    try:
        lines = os.read(reader, 65536).decode(errors="replace").split("\n")
    except BlockingIOError:
        return []
    return [line.removeprefix(token + " ") for line in lines if line.startswith(token + " ")]


def _remove(workdir: str) -> None:
    try:
        shutil.rmtree(workdir)
    except (OSError, RecursionError):
        # The program may have made folders unreadable, or nested them deeper than rmtree can follow.
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", workdir], check=False, stderr=subprocess.DEVNULL)
