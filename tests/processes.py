"""Start some processes that meet as those of a launcher do, and get what each of them gives."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START_S = 120.0
"""How long processes may take; most of it is the import of torch on a busy machine."""


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
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes, processes = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, rank, count, port, function, arguments), daemon=True)
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
    pipe: Connection, rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # there may be fewer GPUs than processes
    try:
        pipe.send((None, function(*arguments)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    time.sleep(START_S)  # one that leaves ends its connections, and with them what others are about to say
