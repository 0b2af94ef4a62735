"""Environments are made once for each slot and closed at the end, and one that misbehaves harms no other."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from grpo_cli.episode.environments import environment_kind
from grpo_cli.episode.pool import EnvironmentPool
from grpo_cli.errors import RunError, UserError


class Game:
    """Counts its objects; `trouble` says what goes wrong."""

    trouble = ""
    made: list[Game]
    closed: list[Game]

    def __init__(self) -> None:
        if self.trouble == "make":
            raise RuntimeError("no such server")
        self.made.append(self)

    def reset(self, **columns: Any) -> None:
        pass

    def close(self) -> None:
        if self.trouble == "close":
            raise RuntimeError("gone already")
        if self.trouble == "hang":
            time.sleep(5)
        self.closed.append(self)


@pytest.fixture
def pool() -> EnvironmentPool:
    Game.trouble, Game.made, Game.closed = "", [], []
    kinds = {name: environment_kind(Game, name) for name in ("a", "b")}
    Game.made.clear()
    Game.closed.clear()
    return EnvironmentPool(kinds)


def test_as_many_are_made_as_are_out_at_the_same_time(pool: EnvironmentPool) -> None:
    for _ in range(3):
        taken = [pool.take("a") for _ in range(4)]
        assert len({id(game) for game in taken}) == 4
        for game in taken:
            pool.give_back("a", game)
    other = pool.take("b")
    assert other not in taken
    assert len(Game.made) == 5
    pool.give_back("b", other)
    pool.close()
    assert len(Game.closed) == 5


def test_no_two_threads_have_the_same_one(pool: EnvironmentPool) -> None:
    out: set[int] = set()
    lock = threading.Lock()

    def play(_: int) -> None:
        game = pool.take("a")
        with lock:
            assert id(game) not in out
            out.add(id(game))
        time.sleep(0.001)
        with lock:
            out.remove(id(game))
        pool.give_back("a", game)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(play, range(200)))
    assert len(Game.made) <= 8


def test_one_that_is_discarded_is_closed_unless_a_call_hangs_in_it(pool: EnvironmentPool) -> None:
    broken, hanging = pool.take("a"), pool.take("a")
    pool.discard("a", broken)
    pool.discard("a", hanging, hangs=True)
    assert pool.take("a") not in (broken, hanging)
    deadline = time.monotonic() + 5
    while not Game.closed and time.monotonic() < deadline:
        time.sleep(0.01)
    pool.close()
    assert Game.closed == [broken]


def test_a_name_that_no_environment_has_and_one_that_cannot_be_made(pool: EnvironmentPool) -> None:
    with pytest.raises(UserError, match=r"column environment is 'c', and episode\.environment has a, b"):
        pool.take("c")
    Game.trouble = "make"
    with pytest.raises(RunError, match=r"environment Game cannot be made: .*RuntimeError: no such server"):
        pool.take("a")


@pytest.mark.parametrize(
    ("trouble", "warning"),
    [("close", "environment Game: close failed"), ("hang", "2 environments did not close within 0.2 seconds")],
)
def test_the_end_waits_for_no_environment_and_fails_for_none(
    pool: EnvironmentPool, caplog: pytest.LogCaptureFixture, trouble: str, warning: str
) -> None:
    for game in (pool.take("a"), pool.take("a")):
        pool.give_back("a", game)
    Game.trouble = trouble
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        pool.close(timeout_s=0.2)
    assert time.monotonic() - began < 4
    assert warning in caplog.text
    pool.close()  # there is nothing left to close
