"""A relay in front of the server, as a proxy or a load balancer is, that fails in the ways in which those fail.

It has connections of its own to both, so it can acknowledge bytes that never arrive, and close amid a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from functools import partial
from typing import Any

from tests.links.namespaces import enter
from tests.links.schedules import TO_SERVER, TO_TRAINER, Fault, Script

BAD_GATEWAY = (
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 36\r\nConnection: close\r\n\r\n"
    b"<html><h1>502 Bad Gateway</h1></html>"[:36]
)

PIECE_BYTES, PIECE_S = 24, 0.01
"""Of a message that trickles."""

LONGEST_LATE_S = 0.15

LARGEST_PART = 400
"""Bytes of a message that get through before it is broken off."""


class Relay:
    """Listens on all addresses of a namespace, in a thread of its own.

    Args:
        namespace: path; this process's own if empty.
        server_port: where the server listens on the loopback address.
    """

    def __init__(self, namespace: str | None, server_port: int) -> None:
        self._namespace, self._server_port = namespace, server_port
        self._script = Script([])
        self._late_s = 0.0
        self._refuses: set[str] = set()
        """Kinds of faults that answer new connections."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def begin(self, script: Script) -> None:
        """Be a good relay, until the script says otherwise. Connections that are there end."""
        self._do(self._begin(script))

    def close(self) -> None:
        self._do(self._begin(Script([])))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _run(self) -> None:
        if self._namespace is not None:
            enter(self._namespace)
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        listening = self._loop.run_until_complete(asyncio.start_server(self._serve, "0.0.0.0", 0))
        self.port: int = listening.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        listening.close()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _begin(self, script: Script) -> None:
        self._script, self._late_s = script, 0.0
        self._refuses.clear()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        mine = [writer]
        self._writers.add(writer)
        try:
            if "relay gone" in self._refuses:
                _reset(writer)
                return
            if "bad gateway" in self._refuses:
                await self._answer(reader, writer)
                return
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
            mine.append(server_writer)
            self._writers.add(server_writer)
            await _first_of(
                self._pump(TO_SERVER, reader, server_writer, mine),
                self._pump(TO_TRAINER, server_reader, writer, mine),
            )
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # one end has gone, or the run that it was for, and so the other goes
        finally:
            self._tasks.discard(task)
            for one in mine:
                self._writers.discard(one)
                one.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(BAD_GATEWAY)
        await writer.drain()

    async def _pump(
        self,
        direction: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        both: list[asyncio.StreamWriter],
    ) -> None:
        swallows = False
        while data := await reader.read(65536):
            for fault in self._script.seen(direction, data):
                part = data[: int(fault.amount * min(len(data), LARGEST_PART))]
                if fault.kind == "late":
                    self._late_s = LONGEST_LATE_S * fault.amount
                elif fault.kind == "stalled":
                    await asyncio.sleep(fault.wait_s + fault.lasts_s)
                elif fault.kind == "trickling":
                    await _trickle(data, writer)
                    data = b""
                elif fault.kind == "swallowed":
                    writer.write(part)
                    swallows = True
                else:
                    writer.write(part)
                    await writer.drain()
                    self._break_off(fault, both)
                    return
            if not swallows:
                await asyncio.sleep(self._late_s)
                writer.write(data)
                await writer.drain()

    def _break_off(self, fault: Fault, both: list[asyncio.StreamWriter]) -> None:
        if fault.kind == "broken off":
            return  # whoever pumps ends, and both ends are closed
        if fault.kind == "bad gateway":
            self._refuses.add(fault.kind)
            self._loop.call_later(fault.lasts_s, partial(self._refuses.discard, fault.kind))
        elif fault.kind == "relay gone":
            self._refuses.add(fault.kind)
            both = [*self._writers]
        for writer in both:
            _reset(writer)


async def _trickle(data: bytes, writer: asyncio.StreamWriter) -> None:
    for start in range(0, len(data), PIECE_BYTES):
        writer.write(data[start : start + PIECE_BYTES])
        await writer.drain()
        await asyncio.sleep(PIECE_S)


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Wait until one ends, and end the other."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST."""
    with contextlib.suppress(OSError, AttributeError):  # it has ended already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
