"""Waiting for the trainer in a process group, but not for one that has gone.

A broadcast that has begun ends with the group's time limit of ten minutes, or with its connections, whose end NCCL
may not notice. So a worker waits in a thread, and watches the trainer by a connection of its own.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

Value = TypeVar("Value")

LOOK_S = 0.5
"""Between two looks at the trainer's connection."""

KEEP_ALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4}
"""Silent seconds until the kernel asks the trainer's machine, seconds between its questions, and their number. The
other kernel answers, so that a process that is stopped or busy is not gone, but a machine that vanished is."""


class SenderGone(ConnectionError):
    """The trainer's process has ended, or its machine cannot be reached any more."""


class Sender:
    """The process that hosts the store of a process group, watched through a silent connection to that store.

    Args:
        host, port: of the store.
        timeout_s: of the connection.

    Raises:
        OSError: nobody listens there.
    """

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self.name = f"{host}:{port}"
        self._connection = socket.create_connection((host, port), timeout_s)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):  # Linux has them all
                self._connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def is_there(self) -> bool:
        """Whether the connection stands; nothing ever comes through it but its end."""
        poll = select.poll()  # unlike select, for any number of open files
        poll.register(self._connection, select.POLLIN)
        return not poll.poll(0)

    def while_there(self, call: Callable[[], Value]) -> Value:
        """What `call` gives, or raises. It goes on in a thread that nobody waits for if the trainer has gone.

        Raises:
            SenderGone: before the call was done.
        """
        done = in_background(call)
        while not wait([done], timeout=LOOK_S).done:
            if not self.is_there():
                raise SenderGone(f"the trainer at {self.name} has gone in the middle of it")
        return done.result()

    def close(self) -> None:
        with suppress(OSError):
            self._connection.close()


def in_background(call: Callable[[], Value]) -> Future[Value]:
    """Run `call` in a daemon thread, which does not keep an ending process alive even if it hangs."""
    future: Future[Value] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
