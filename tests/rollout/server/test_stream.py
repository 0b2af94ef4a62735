"""A server is asked for as much as it can hold, whenever it comes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import pytest

from grpo_cli.rollout.engine import SampledTurn, Turn
from grpo_cli.rollout.server.stream import Lane, ServerStream
from tests.rollout.driving import first_turns

SAID = SampledTurn([5], [-1.0], "stop", "&")


class Server:
    """Holds what it is asked for until it is let go."""

    def __init__(self) -> None:
        self.asked: SimpleQueue[Sequence[Turn]] = SimpleQueue()
        self.go = threading.Event()

    def send(self, server: Any, turns: Sequence[Turn]) -> list[SampledTurn]:
        self.asked.put((server, turns))
        assert self.go.wait(10)
        return [SAID] * len(turns)


def turns(group: int, size: int = 1) -> list[Turn]:
    return [replace(turn, may_go_on=True) for turn in first_turns([1], (0,), size, 8, group=group)]


@pytest.mark.parametrize("room", [3, 256])
def test_turns_that_come_late_wait_for_no_other_while_there_is_room(room: int) -> None:
    server: Any = Server()
    done: SimpleQueue[int] = SimpleQueue()
    lane = Lane("one", room)  # type: ignore[arg-type]
    stream = ServerStream([lane], server.send, lambda completion, _: done.put(completion), lambda _: None)
    for group in range(6):  # one after the other, as environments are reset
        stream.ask(turns(group))
    for _ in range(min(room, 6)):
        server.asked.get(timeout=5)
    assert lane.threads == min(room, 6)
    server.go.set()
    assert sorted(done.get(timeout=5) for _ in range(6)) == list(range(6))
    stream.stop()


def test_a_later_turn_goes_to_the_server_that_has_the_one_before() -> None:
    server: Any = Server()
    server.go.set()
    done: SimpleQueue[int] = SimpleQueue()
    lanes: Any = [Lane(name, 8) for name in ("one", "two")]  # type: ignore[arg-type]
    stream = ServerStream(lanes, server.send, lambda completion, _: done.put(completion), lambda _: None)
    first = [turn for group in range(8) for turn in turns(group)]
    stream.ask(first)
    homes = {asked[0].completion: name for name, asked in (server.asked.get(timeout=5) for _ in range(8))}
    for _ in range(8):
        done.get(timeout=5)
    stream.ask([replace(turn, number=1) for turn in first])
    later = {asked[0].completion: name for name, asked in (server.asked.get(timeout=5) for _ in range(8))}
    assert later == homes
    stream.stop()
