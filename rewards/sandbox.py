"""Runs Python that a model wrote, in a child process with limits.

Made for code that is careless: loops for ever, eats memory, prints without end, leaves processes behind, or
ends early with exit code 0. It is NOT a security boundary. The code runs as your user, so it can read the
files that you can read (and through /proc the environment of your other processes), write wherever you can,
and use the network. Whoever must stop code that means harm runs the trainer in a container or a virtual
machine.

The other half, which runs inside the child process, is `sandbox_child.py`.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")

# What the child may take beyond its own timeout: a cold interpreter on a shared disk starts slowly.
_START_AND_STOP_S = 60.0
# How often to look whether the child ended while something that escaped it still holds its output open.
_POLL_S = 0.05


@dataclass(frozen=True)
class RunResult:
    """How a run of `run_python` ended."""

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

    Output beyond `output_bytes` is read and thrown away, so that printing much changes no verdict and fills
    no memory.

    Raises:
        RuntimeError: the child process could not start.
    """
    token = secrets.token_hex(16)
    job = {
        "parts": [source] if isinstance(source, str) else list(source),
        "token": token,
        "timeout_s": timeout_s,
        "memory_bytes": memory_mb * 1024 * 1024,
        "cpu_s": math.ceil(timeout_s) + 1,
    }
    workdir = tempfile.mkdtemp(prefix="grpo-sandbox-")
    report_reader, report_writer = os.pipe()
    try:
        child = _start(job, workdir, report_writer)
        try:
            output = _read_until_end(child, time.monotonic() + timeout_s + _START_AND_STOP_S, output_bytes)
        finally:
            _stop(child)
        return _result(child.returncode, output, _read_reports(report_reader, token))
    finally:
        os.close(report_reader)
        os.close(report_writer)
        _remove(workdir)


def _start(job: dict[str, object], workdir: str, report_writer: int) -> subprocess.Popen[bytes]:
    # Everything the child must know goes in over standard input: on its command line, in its environment or
    # in its working directory, the code that it runs would find the token and the tests.
    with tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(job).encode())
        stdin.seek(0)
        return subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", "-X", "utf8", str(_CHILD), str(report_writer)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=workdir,
            env=_environment(workdir),
            pass_fds=(report_writer,),
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


def _read_until_end(child: subprocess.Popen[bytes], deadline: float, limit: int) -> bytes:
    """Read the child's output until it ends or the deadline passes; keep the first `limit` bytes."""
    assert child.stdout is not None
    output = bytearray()
    # Not select(): it fails on descriptors above 1023, and a trainer may have that many.
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            ended = child.poll() is not None
            ready = selector.select(0 if ended else min(_POLL_S, left))
            if ready:
                chunk = os.read(child.stdout.fileno(), 65536)
                output += chunk[: limit - len(output)]
                if not chunk:
                    break
            elif ended:
                return bytes(output)
    # A program may close its output and run on.
    with suppress(subprocess.TimeoutExpired):
        child.wait(max(0.0, deadline - time.monotonic()))
    return bytes(output)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Make sure that nothing of the child is left; it has usually ended by itself."""
    assert child.stdout is not None
    child.stdout.close()
    if child.poll() is None:
        # Asked to end, it kills what it started, which we may not be able to find.
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(2.0)
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _read_reports(reader: int, token: str) -> set[str]:
    """Return the words that came with the token, which the code that ran does not know."""
    os.set_blocking(reader, False)
    try:
        lines = os.read(reader, 65536).decode(errors="replace").split("\n")
    except BlockingIOError:
        return set()
    return {line.removeprefix(token + " ") for line in lines if line.startswith(token + " ")}


def _result(exit_code: int, output: bytes, reports: set[str]) -> RunResult:
    text = output.decode(errors="replace")
    if "started" not in reports:
        raise RuntimeError(
            f"the sandbox could not start {sys.executable} within {_START_AND_STOP_S:g} s "
            f"(exit code {exit_code}); it said: {text[-2000:].strip() or 'nothing'}"
        )
    return RunResult(exit_code, "timed out" in reports, text, "finished" in reports)


def _remove(workdir: str) -> None:
    try:
        shutil.rmtree(workdir)
    except (OSError, RecursionError):
        # The program may have made folders unreadable, or nested them deeper than rmtree can follow.
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", workdir], check=False, stderr=subprocess.DEVNULL)
