"""Processes: every system that is measured lives in one of its own and does one thing at a time when asked.

A request and its answer are a line of JSON each. While nothing is asked of a worker it sleeps in a read, and its
threads with it, so that several stay alive at once and take turns without disturbing each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from typing import IO, Any, TextIO

WORKER_FLAG = "--worker"
Message = dict[str, Any]


class WorkerError(Exception):
    """A worker ended before it answered; the message is the end of what it printed."""


class Channel:
    """The worker's end of the pipe."""

    def __init__(self) -> None:
        # What libraries print to the standard output must not be taken for an answer.
        self._answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def receive(self) -> Message:
        """Wait for a request; where none will come any more, end the process."""
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        message: Message = json.loads(line)
        return message

    def send(self, **answer: Any) -> None:
        self._answers.write(json.dumps(answer) + "\n")


class Worker:
    """The parent's end: starts `python -m module --worker` and asks it.

    Args:
        module: its main function reads the first request, `spec`, from a `Channel` and answers when it is ready.
        spec: what the worker is to be; its `device` is cpu or cuda.
        threads: of torch in it.

    Raises:
        WorkerError: it did not become ready.
    """

    ready: Message
    """The answer to `spec`."""

    def __init__(self, module: str, spec: Message, threads: int) -> None:
        self._name = f"{module} {spec}"
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, WORKER_FLAG],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | _environment(threads, spec["device"]),
            text=True,
        )
        try:
            self.ready = self.ask(**spec)
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> Message:
        """Send a request and wait for its answer.

        Raises:
            WorkerError: the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self._name} ended:\n{self._last_lines(15)}")
        answer: Message = json.loads(line)
        return answer

    def _last_lines(self, count: int) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").replace("\r", "\n").splitlines()
        return "\n".join(lines[-count:])

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _environment(threads: int, device: str) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return hidden | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def peak_memory(device: str) -> int:
    """Bytes: of the process while it lives, or what its tensors took of the card."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
