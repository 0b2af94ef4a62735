"""Turns on their way to servers and back, on threads of their own."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from grpo_cli.distributed.outcome import outcome_of
from grpo_cli.rollout.engine import OnTurn, SampledTurn, Turn
from grpo_cli.rollout.server.connection import ServerConnection

Send = Callable[[ServerConnection, Sequence[Turn]], list[SampledTurn]]
"""Has a server generate turns that all begin alike."""


@dataclass
class Lane:
    """A server and the turns that only it is to generate."""

    server: ServerConnection
    room: int
    """Turns that it can generate at a time."""
    further: deque[Sequence[Turn]] = field(default_factory=deque)
    threads: int = 0
    idle: int = 0
    """Of these, on their way to something to do, or waiting for it."""


class ServerStream:
    """A `TurnStream`: each server takes as many turns as it can hold, and another one whenever one is done.

    A later turn goes to the server that has generated the one before it, which has its keys and values.

    Args:
        lanes: at least one.
        send: raises what ends the stream.
        on_turn: told of each finished turn, on the thread that sent it.
        check: raises UserError for turns that are too long.
    """

    def __init__(
        self, lanes: Sequence[Lane], send: Send, on_turn: OnTurn, check: Callable[[Sequence[Turn]], None]
    ):
        self._lanes = list(lanes)
        self._send = send
        self._on_turn = on_turn
        self._check = check
        self._first: deque[Sequence[Turn]] = deque()
        self._home: dict[int, Lane] = {}
        """By completion, who has generated its turns."""
        self._changed = threading.Condition()
        self._is_stopped = False

    def ask(self, turns: Sequence[Turn]) -> None:
        """See `TurnStream.ask`.

        Raises:
            UserError: a turn may become longer than the servers take.
        """
        self._check(turns)
        with self._changed:
            for turn in turns:
                if turn.number:
                    self._home[turn.completion].further.append([turn])
            first = [turn for turn in turns if not turn.number]
            for _, group in groupby(first, key=lambda turn: turn.group):
                own = list(group)
                # A group that ends with its first turns is one request; otherwise none waits for the others.
                self._first.extend([[turn] for turn in own] if own[0].may_go_on else [own])
            self._start_threads()
            self._changed.notify_all()

    def _start_threads(self) -> None:
        share = math.ceil(len(self._first) / len(self._lanes))
        size = max(map(len, self._first), default=1)
        for lane in self._lanes:
            most, waiting = max(1, lane.room // size), share + len(lane.further) - lane.idle
            for _ in range(min(most - lane.threads, waiting)):
                lane.threads += 1
                lane.idle += 1
                daemon(partial(self._work, lane))

    def advance(self) -> bool:
        """See `TurnStream.advance`: the servers compute."""
        return False

    def forget(self, completion: int) -> None:
        """See `TurnStream.forget`: a server's cache drops what is used least by itself."""
        self._home.pop(completion, None)

    def stop(self) -> None:
        """Send nothing any more."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _next(self, lane: Lane) -> Sequence[Turn] | None:
        """What this server is to generate next, for a thread that is idle until then; None when all is over."""
        with self._changed:
            while not self._is_stopped:
                waiting = lane.further or self._first
                if waiting:
                    lane.idle -= 1
                    return waiting.popleft()
                self._changed.wait()
        return None

    def _work(self, lane: Lane) -> None:
        while (turns := self._next(lane)) is not None:
            outcome = outcome_of(partial(self._send, lane.server, turns), (Exception,))
            if self._is_stopped:
                return
            if isinstance(outcome, Exception):
                self._on_turn(turns[0].completion, outcome)
                return
            for turn, sampled in zip(turns, outcome, strict=True):
                if turn.may_go_on:
                    self._home[turn.completion] = lane
                self._on_turn(turn.completion, sampled)
            with self._changed:
                lane.idle += 1


def daemon(target: Callable[[], None]) -> None:
    """Run in a thread that does not keep an ending process alive, as one that waits for a hung server would."""
    threading.Thread(target=target, daemon=True).start()
