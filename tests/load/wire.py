"""HTTP/1.1 on a bare socket: only so can a client send byte by byte, read slowly, or leave at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SMALL_BUFFER = 4096
"""Bytes that the kernel keeps for a slow reader."""

READ_BYTES, SLOW_READ_BYTES, SLOW_READ_S = 2**18, 2048, 0.02


class Unanswered(Exception):
    """The server closed the connection before its answer was whole."""


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    keeps_open: bool
    """Whether the connection takes another request."""


def request_bytes(
    method: str, path: str, headers: Mapping[str, str], body: bytes | None = None, *, closes: bool = False
) -> bytes:
    """A whole request. Headers that are given replace those that it would have."""
    own = {"Host": "127.0.0.1"}
    if body is not None:
        own |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    if closes:
        own["Connection"] = "close"
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (own | {**headers}).items())]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


class Connection:
    """One to the server on this machine.

    Args:
        port: of the server.
        reads_slowly: whether a little at a time is read, with pauses.
    """

    def __init__(self, port: int, *, reads_slowly: bool = False) -> None:
        self.port = port
        self.reads_slowly = reads_slowly
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        if reads_slowly:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        self._buffer = b""
        self._loop = asyncio.get_running_loop()

    async def open(self) -> None:
        await self._loop.sock_connect(self._socket, ("127.0.0.1", self.port))

    def has_ended(self) -> bool:
        """Whether the server has closed it, as it does when nothing was asked for five seconds."""
        with contextlib.suppress(BlockingIOError):
            return not self._socket.recv(1, socket.MSG_PEEK)
        return False

    async def send(self, data: bytes, *, pieces: int = 1, pause_s: float = 0.0) -> None:
        """Send in about so many pieces, with a pause after each.

        A server that refuses early may close meanwhile; its answer can be read all the same.
        """
        size = -(-len(data) // pieces)
        try:
            for start in range(0, len(data), size):
                await self._loop.sock_sendall(self._socket, data[start : start + size])
                if pieces > 1:
                    await asyncio.sleep(pause_s)
        except ConnectionError:
            return

    async def answer(self) -> Answer:
        """A whole answer.

        Raises:
            Unanswered: the connection ended before.
        """
        status, headers = await self._head()
        while status == 100:  # go on, which is what this client did
            status, headers = await self._head()
        if headers.get("transfer-encoding") == "chunked":
            body = await self._chunks()
        elif "content-length" in headers:
            body = await self._exactly(int(headers["content-length"]))
        else:
            body = await self._rest()
        return Answer(status, body, keeps_open=headers.get("connection") != "close")

    async def _head(self) -> tuple[int, dict[str, str]]:
        status = (await self._line()).split(" ")[1]
        headers = {}
        while line := await self._line():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return int(status), headers

    async def _chunks(self) -> bytes:
        parts = []
        while size := int(await self._line(), 16):
            parts.append(await self._exactly(size))
            await self._line()
        await self._line()
        return b"".join(parts)

    async def _line(self) -> str:
        while b"\r\n" not in self._buffer:
            self._buffer += await self.read()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line.decode("latin-1")

    async def _exactly(self, size: int) -> bytes:
        parts = [self._buffer]
        missing = size - len(self._buffer)
        while missing > 0:
            parts.append(await self.read())
            missing -= len(parts[-1])
        whole = b"".join(parts)
        self._buffer = whole[size:]
        return whole[:size]

    async def _rest(self) -> bytes:
        """What comes before the server closes, which is how an answer to what is no HTTP ends."""
        with contextlib.suppress(Unanswered):
            while True:
                self._buffer += await self.read()
        return self._buffer

    async def read(self) -> bytes:
        """What has arrived.

        Raises:
            Unanswered: nothing will.
        """
        try:
            if not self.reads_slowly:
                part = await self._loop.sock_recv(self._socket, READ_BYTES)
            else:
                await asyncio.sleep(SLOW_READ_S)
                part = await self._loop.sock_recv(self._socket, SLOW_READ_BYTES)
        except ConnectionError as error:
            raise Unanswered(f"after {self._buffer[:100]!r}: {error}") from error
        if not part:
            raise Unanswered(f"the connection was closed after {self._buffer[:100]!r}")
        return part

    def leave(self, *, abruptly: bool = False) -> None:
        """Close; abruptly by a reset, as a client does that is killed with an answer on its way."""
        if abruptly:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()
