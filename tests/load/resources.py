"""What a server holds while nobody asks it for anything: after a load as much as before."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil

from grpo_cli.serve.protocol import GENERATE
from tests.integration.serving import Serve, wait_until
from tests.load.wire import Connection, as_json, request_bytes
from tests.soak.growth import Measure

SETTLE_S = 20.0
"""Longest wait for the server to notice that all clients have gone."""

ABANDONED, ABANDONED_N, ABANDONED_TOKENS = 8, 16, 900
"""Requests, and completions and tokens of each."""

MEASURES = (
    Measure("resident memory of the server", "KiB", per_step=0, slack=32 * 1024),
    Measure("of its engine", "KiB", per_step=0, slack=16 * 1024),
    Measure("of its workers", "KiB", per_step=0, slack=32 * 1024),
    Measure("open files"),
    Measure("threads"),
    Measure("processes"),
    Measure("connections of clients"),
    Measure("requests in the engine"),
)


@dataclass(frozen=True)
class Processes:
    server: psutil.Process
    engine: psutil.Process
    others: list[psutil.Process]

    @property
    def all(self) -> list[psutil.Process]:
        return [self.server, self.engine, *self.others]


def processes_of(server: Serve) -> Processes:
    first, engine = psutil.Process(server.process.pid), server.engine()
    return Processes(first, engine, [one for one in server.processes() if one not in (first, engine)])


def settle(server: Serve) -> None:
    """Wait until no request is left in the engine and no client's connection in the server.

    Raises:
        AssertionError: some are, after `SETTLE_S`.
    """
    wait_until(lambda: not requests_in_engine(server) and not connections(server), SETTLE_S)


def measure(server: Serve) -> list[float]:
    """A value for each of `MEASURES`."""
    found = processes_of(server)
    return [
        found.server.memory_info().rss / 1024,
        found.engine.memory_info().rss / 1024,
        sum(process.memory_info().rss for process in found.others) / 1024,
        sum(process.num_fds() for process in found.all),
        sum(process.num_threads() for process in found.all),
        len(found.all),
        connections(server),
        requests_in_engine(server),
    ]


async def abandon(server: Serve) -> float:
    """Ask for much, leave, and wait until the engine is empty; the share that was generated all the same.

    Raises:
        AssertionError: the requests did not begin, or were not given up.
    """
    body = {"token_ids": [1] * 50, "n": ABANDONED_N, "max_completion_tokens": ABANDONED_TOKENS}
    raw = request_bytes("POST", GENERATE, {"Authorization": f"Bearer {server.key()}"}, as_json(body))
    clients = [Connection(server.port) for _ in range(ABANDONED)]
    before = _metric(server, "generation_tokens_total")
    for client in clients:
        await client.open()
        await client.send(raw)
    wait_until(lambda: _metric(server, "generation_tokens_total") > before, SETTLE_S)
    for client in clients:
        client.leave()
    settle(server)
    asked_for = ABANDONED * ABANDONED_N * ABANDONED_TOKENS
    return (_metric(server, "generation_tokens_total") - before) / asked_for


def connections(server: Serve) -> int:
    """Of clients, in whatever state, that the server has open."""
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(one.status != psutil.CONN_LISTEN and one.laddr.port == server.port for one in found)


def requests_in_engine(server: Serve) -> int:
    """Running or waiting, as the engine counts them."""
    return int(_metric(server, "num_requests_running") + _metric(server, "num_requests_waiting"))


def _metric(server: Serve, name: str) -> float:
    with server.http(server.key()) as http:
        text = http.get("/metrics", headers={"Connection": "close"}).text
    (value,) = re.findall(rf"^vllm:{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    return float(value)
