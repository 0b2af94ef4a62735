"""Processes that have torch and the program imported when they begin, which saves each of them ten seconds.

They are forked from one that has done nothing but import (`tests.warm`); apart from that they are processes like
any other: they are killed, get signals, and have an environment, a folder and an exit code of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpo_cli import cli

ROOT = Path(__file__).parents[1]

START_S = 120.0
"""How long processes may take to begin and do what they are started for, on a busy machine."""

_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(["tests.warm"])


class Command:
    """A command line as a process, with those methods of `subprocess.Popen` that tests use.

    Args:
        arguments: of the command line.
        environment: all of its variables; those of this process if not given.
        folder: the current one, from which it imports first.
        main: what finds the arguments in `sys.argv`; that of `grpo` if not given.
        errors_apart: whether stderr is not to be part of the output.
    """

    def __init__(
        self,
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
        main: Callable[[], None] = cli.main,
        errors_apart: bool = False,
    ) -> None:
        self._output = tempfile.NamedTemporaryFile(prefix="output-")  # noqa: SIM115
        self._errors = tempfile.NamedTemporaryFile(prefix="errors-")  # noqa: SIM115
        files = [self._output.name, self._errors.name if errors_apart else self._output.name]
        variables = dict(os.environ if environment is None else environment)
        start = ([*map(str, arguments)], variables, str(folder), files, main)
        self._process = _WARM.Process(target=_run_command, args=start, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("grpo", timeout, "".join(self.printed()))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed, once it has ended."""
        self.wait(timeout)
        return self.printed()

    def printed(self) -> tuple[str, str]:
        """What it and its children have printed by now, on stderr only if that is kept apart."""
        output, errors = (Path(file.name).read_text(errors="replace") for file in (self._output, self._errors))
        return output, errors


def run_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` gives in each of `count` processes, in the order of their ranks.

    Args:
        count: of processes; each has the environment that torchrun would give it.
        function: of a module that the processes can import.
        arguments: picklable, as the function's value must be.

    Raises:
        AssertionError: it raised in some of them; the message has their tracebacks.
        TimeoutError: they are not done after `START_S`.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(count):
        receiver, sender = _WARM.Pipe(duplex=False)
        place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}  # there may be fewer GPUs than processes
        process = _WARM.Process(target=_work, args=(sender, environment, function, arguments), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    deadline = time.monotonic() + START_S
    try:
        outcomes = [_receive(pipe, deadline) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [f"rank {rank}: {failure}" for rank, (failure, _) in enumerate(outcomes) if failure]
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]


def run_ranks(count: int, *arguments: str | Path, folder: Path = ROOT) -> tuple[list[int], str]:
    """Exit codes and output of `grpo ARGUMENTS` in processes that are started as a launcher of the user's does."""
    with tempfile.NamedTemporaryFile(prefix="output-") as output:
        files = [output.name, output.name]
        codes = run_processes(count, _exit_code, [*map(str, arguments)], str(folder), files, cli.main)
        return codes, Path(output.name).read_text(errors="replace")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _receive(pipe: Connection, deadline: float) -> Any:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError(f"a process is not done after {START_S} s")
    try:
        return pipe.recv()
    except EOFError:
        return "it ended without a word", None


def _work(
    pipe: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    _become(environment)
    try:
        pipe.send((None, function(*arguments)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    time.sleep(START_S)  # one that leaves ends its connections, and with them what others are about to say


def _run_command(arguments: list[str], environment: dict[str, str], *rest: Any) -> None:
    _become(environment)
    sys.exit(_exit_code(arguments, *rest))


def _exit_code(arguments: list[str], folder: str, files: list[str], main: Callable[[], None]) -> int:
    """That of a command line that runs in this process."""
    streams = [sys.stdout, sys.stderr]
    for stream, file in zip(streams, files, strict=True):
        stream.flush()
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream.fileno())
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["grpo", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for stream in streams:
            stream.flush()
    return 0


def _become(environment: dict[str, str]) -> None:
    """Take these variables in place of those of the process that this one is a copy of."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # or it stays what TMPDIR was before
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
