"""Groups of processes that train together, forked for each measurement from a process that has all imports.

Nothing of a measurement stays behind, neither memory nor a library's settings, and strategies can take turns in a
run without seconds of imports in each turn.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ANSWER_S = 900.0
"""How long a group may take for what it is asked."""

END_S = 10.0
"""How long a process may take to leave once all have answered."""


class ProcessError(Exception):
    """A process of a group raised, ended or was silent; the message says which, with its traceback."""


class ProcessGroups:
    """Starts groups of processes; each process computes with one thread and sees no GPU.

    Args:
        module: imported once, and where the functions that are run come from.
        log: file that gets what they print.
    """

    def __init__(self, module: str, log: Path) -> None:
        os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        self._module = module
        self._log = log
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([module])

    def run(self, count: int, function: str, *arguments: Any) -> list[Any]:
        """What `function(*arguments)` of the module gives in each of `count` processes, by rank.

        Args:
            count: of processes; each has the environment that torchrun would give it.
            function: its name.
            arguments: picklable, as the function's value must be.

        Raises:
            ProcessError: one of them failed.
        """
        port = _free_port()
        pipes: list[Connection] = []
        processes = []
        try:
            for rank in range(count):
                ours, theirs = self._context.Pipe()
                place = _environment(rank, count, port)
                task = (theirs, place, str(self._log), self._module, function, arguments)
                process = self._context.Process(target=_work, args=task, daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            return _answers(pipes, f"{function}{arguments}")
        except ProcessError as error:
            last = self._log.read_text(errors="replace").splitlines()[-15:] if self._log.exists() else []
            raise ProcessError("\n".join([str(error), *last])) from None
        finally:
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join(END_S)
                process.kill()
                process.join()


def _answers(pipes: Sequence[Connection], task: str) -> list[Any]:
    deadline = time.monotonic() + ANSWER_S
    values: dict[int, Any] = {}
    while len(values) < len(pipes):
        for rank, pipe in enumerate(pipes):
            if rank in values or not pipe.poll(0.05):  # the first to fail is told, not those that wait for it
                continue
            try:
                failure, values[rank] = pipe.recv()
            except EOFError:
                failure = "it ended without a word; out of memory perhaps"
            if failure:
                raise ProcessError(f"rank {rank} of {len(pipes)}, {task}: {failure}")
        if time.monotonic() > deadline:
            raise ProcessError(f"{task}: {len(pipes) - len(values)} processes are not done after {ANSWER_S} s")
    return [values[rank] for rank in range(len(pipes))]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _work(
    pipe: Connection, place: dict[str, str], log: str, module: str, function: str, arguments: Sequence[Any]
) -> None:
    os.environ |= place
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        pipe.send((None, getattr(importlib.import_module(module), function)(*arguments)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    with contextlib.suppress(EOFError):
        pipe.recv()  # one that leaves ends its connections, and with them what others are about to say
