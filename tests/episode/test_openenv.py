"""An environment may be a client of an OpenEnv server: here one with a server of its own on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("openenv.core", exc_type=ImportError)
pytest.importorskip("uvicorn")

import uvicorn
from fastapi import FastAPI
from openenv import core
from openenv.core import env_server

from grpo_cli.episode.environments import environment_kind, environment_rewards
from grpo_cli.episode.pool import EnvironmentPool
from grpo_cli.reward.scorer import Scorer, ScoringBatch

PATIENCE_S = 30.0


class Add(env_server.Action):
    amount: int


class Sum(env_server.Observation):
    total: int


class CountingServer(env_server.Environment):
    """What runs on the server: counts from the seed."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Sum:
        self.total = seed or 0
        return Sum(total=self.total)

    def step(self, action: Add, timeout_s: float | None = None, **_: Any) -> Sum:
        self.total += action.amount
        return Sum(total=self.total, reward=float(self.total))

    @property
    def state(self) -> Any:
        return env_server.State(step_count=0)


class Counting:
    """What the recipe names: OpenEnv's client, with a tool for what a step can be."""

    def __init__(self, base_url: str) -> None:
        self._client = core.GenericEnvClient(base_url=base_url, message_timeout_s=PATIENCE_S).sync()
        self._reward = 0.0

    def reset(self, seed: int = 0, **columns: Any) -> str:
        self._reward = 0.0
        return f"The counter is at {self._client.reset(seed=seed).observation['total']}."

    def add(self, amount: int) -> str:
        """
        Add to the counter.

        Args:
            amount: How much.

        Returns:
            The new count.
        """
        result = self._client.step({"amount": amount})
        self._reward = result.reward
        return str(result.observation["total"])

    def get_reward(self) -> float:
        return self._reward

    def close(self) -> None:
        self._client.close()


@dataclass
class Running:
    url: str
    sessions: Any


@pytest.fixture
def server() -> Iterator[Running]:
    app = FastAPI()
    environments = env_server.HTTPEnvServer(CountingServer, Add, Sum, max_concurrent_envs=8)
    environments.register_routes(app)
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    wait_until(lambda: uvicorn_server.started)
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    yield Running(f"http://127.0.0.1:{port}", environments)
    uvicorn_server.should_exit = True
    thread.join(PATIENCE_S)


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_episodes_on_an_openenv_server_are_apart_and_scored_and_its_sessions_end(server: Running) -> None:
    kind = environment_kind(Counting, None, params={"base_url": server.url})
    assert [tool.name for tool in kind.tools] == ["add"]
    assert kind.takes_seed
    pool = EnvironmentPool({None: kind})

    def play(seed: int) -> tuple[str, str, Any]:
        environment = pool.take(None)
        begin = environment.reset(**kind.reset_arguments([], {}, seed))
        environment.add(amount=2)
        return begin, environment.add(amount=3), environment

    for _ in range(2):
        with ThreadPoolExecutor(4) as threads:
            games = list(threads.map(play, [0, 10, 20, 30]))
        assert [game[:2] for game in games] == [(f"The counter is at {n}.", str(n + 5)) for n in (0, 10, 20, 30)]
        batch = ScoringBatch(["p"] * 4, ["c"] * 4, [[1]] * 4, {}, [game[2] for game in games])
        rewards = Scorer(environment_rewards({None: kind})).score(batch, step=1)
        assert rewards[:, 0].tolist() == [5.0, 15.0, 25.0, 35.0]
        for *_, environment in games:
            pool.give_back(None, environment)
        assert server.sessions.active_sessions == 4, "made once, reset between episodes"
    pool.close()
    wait_until(lambda: server.sessions.active_sessions == 0)
