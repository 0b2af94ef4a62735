"""How a client behaves on its connection: most are quick, some are slow, some leave before they are answered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass

from tests.load.requests import Request
from tests.load.wire import Answer, Connection

QUICK = "quick"

SHARES: Mapping[str, float] = {
    QUICK: 76,
    "sends byte by byte": 4,
    "sends in pieces": 6,
    "reads slowly": 5,
    "leaves in the head": 2,
    "leaves in the body": 2,
    "leaves before the answer": 3,
    "leaves in the answer": 2,
}
"""Manner to its share of all requests."""

SLOW_BYTES = 400
"""A request that is longer is sent in so many pieces instead of byte by byte."""


@dataclass
class Reused:
    """The open connection of a quick client, for its next request."""

    connection: Connection | None = None

    def take(self) -> Connection | None:
        """It, if the server has not closed it meanwhile."""
        connection, self.connection = self.connection, None
        if connection is not None and connection.has_ended():
            connection.leave()
            return None
        return connection


async def converse(request: Request, manner: str, rng: random.Random, port: int, reused: Reused) -> Answer | None:
    """Send a request; its answer, or None from a client that leaves.

    Raises:
        Unanswered: the server closed the connection.
    """
    before = reused.take() if manner == QUICK else None
    connection = before or Connection(port, reads_slowly=manner == "reads slowly")
    keeps = False
    try:
        if before is None:
            await connection.open()
        if manner.startswith("leaves"):
            await _until_it_leaves(connection, request, manner, rng)
            return None
        if manner == "sends byte by byte":
            await connection.send(request.raw, pieces=min(len(request.raw), SLOW_BYTES), pause_s=0.005)
        elif manner == "sends in pieces":
            await connection.send(request.raw, pieces=rng.randint(2, 8), pause_s=rng.uniform(0.02, 0.3))
        else:
            await connection.send(request.raw)
        answer = await connection.answer()
        keeps = manner == QUICK and answer.keeps_open
        if keeps:
            reused.connection = connection
        return answer
    finally:
        if not keeps:
            connection.leave(abruptly=manner.startswith("leaves") and rng.random() < 0.5)


async def _until_it_leaves(connection: Connection, request: Request, manner: str, rng: random.Random) -> None:
    if manner == "leaves in the head" or (manner == "leaves in the body" and not request.has_body):
        await connection.send(request.raw[: rng.randrange(1, request.head)])
    elif manner == "leaves in the body":
        await connection.send(request.raw[: rng.randrange(request.head, len(request.raw))])
    else:
        await connection.send(request.raw)
        if manner == "leaves in the answer":
            await connection.read()
    await asyncio.sleep(rng.uniform(0.0, 0.3))
