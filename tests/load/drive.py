"""Drives a server with many clients at once while its weights are changed under them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server.connection import ServerAway, ServerConnection
from grpo_cli.rollout.server.weight_transfer import fill_memory
from grpo_cli.serve import wire
from grpo_cli.serve.protocol import (
    BEGIN_WEIGHTS,
    COMMIT_WEIGHTS,
    BeginWeights,
    Committed,
    CommitWeights,
    Staging,
    Weights,
)
from tests.integration.serving import Serve
from tests.load.content import Completion, completions_of, versioned
from tests.load.manners import SHARES, Reused, converse
from tests.load.requests import KINDS, Request, Target
from tests.load.wire import Answer, Unanswered

ANSWER_S = 120.0
"""Longest wait for an answer."""

MAX_ATTEMPTS = 10
"""Of a request that updates get in the way of."""

RUN = "load"

BROKEN_UPDATES = ("it never commits", "other bytes than it says")
"""What every fifth update does first; the whole set comes after it."""


@dataclass(frozen=True)
class Job:
    """One request of the schedule."""

    kind: str
    manner: str
    seed: int


def schedule(seed: int, count: int) -> list[Job]:
    """The same jobs for the same seed."""
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), [kind.share for kind in KINDS.values()], k=count)
    manners = rng.choices(list(SHARES), list(SHARES.values()), k=count)
    return [Job(kind, manner, rng.getrandbits(48)) for kind, manner in zip(kinds, manners, strict=True)]


@dataclass
class Tally:
    """What came of the requests."""

    answered: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    resent: Counter[str] = field(default_factory=Counter)
    """Refused or interrupted because of an update, and sent again."""
    slowest_s: Counter[str] = field(default_factory=Counter)
    manners: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    updates: int = 0
    broken_updates: int = 0
    most_at_once: int = 0


class Load:
    """Clients and a trainer of one server.

    Args:
        server: it is running; `update` comes first.
        model: its weights are version 0.
    """

    def __init__(self, server: Serve, model: Any) -> None:
        self.server = server
        self.model = model
        self.key = server.key()
        self.tally = Tally()
        self.version = -1
        self._trainer: ServerConnection = server.client()
        self._started = self._at_once = 0
        self._updating = False
        self._updated = asyncio.Condition()

    async def run(self, jobs: list[Job], clients: int, updates: int) -> None:
        """Do all jobs with so many clients at once, and spread the updates over them."""
        self._started = 0
        waiting = iter(jobs)
        trainer = asyncio.create_task(self._train(len(jobs), updates))
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(waiting))
        await trainer

    async def _train(self, jobs: int, updates: int) -> None:
        for index in range(updates):
            while self._started < jobs * (index + 0.5) / updates:
                await asyncio.sleep(0.01)
            await self.update()

    async def update(self) -> None:
        """Give the server the next version, as a trainer does; at times after an attempt that fails."""
        self._updating = True
        self.tally.updates += 1
        if self.tally.updates % 5 == 0:
            how = BROKEN_UPDATES[self.tally.updates // 5 % 2]
            self.tally.broken_updates += 1
            await asyncio.to_thread(break_update, self._trainer, how, self.model, self.version)
        weights = Weights(run=RUN, version=self.version + 1)
        policy = PolicyWeights(versioned(self.model, weights.version))
        await asyncio.to_thread(self._trainer.send_weights, weights, policy)
        async with self._updated:
            self.version, self._updating = weights.version, False
            self._updated.notify_all()

    def close(self) -> None:
        self._trainer.close()

    async def _client(self, jobs: Iterator[Job]) -> None:
        reused = Reused()
        for job in jobs:
            self._started += 1
            self.tally.manners[job.manner] += 1
            with self._counted():
                try:
                    await self._do(job, reused)
                except (Unanswered, OSError, TimeoutError, ValueError, KeyError) as error:
                    self.tally.failures.append(f"{job}: {type(error).__name__}: {error}")
        if reused.connection is not None:
            reused.connection.leave()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._at_once += 1
        self.tally.most_at_once = max(self.tally.most_at_once, self._at_once)
        yield
        self._at_once -= 1

    async def _do(self, job: Job, reused: Reused) -> None:
        """Send until there is an answer that no update got in the way of."""
        for _ in range(MAX_ATTEMPTS):
            rng = random.Random(job.seed)
            before, was_updating = self.version, self._updating
            target = Target(str(self.server.model), self.key, Weights(run=RUN, version=before))
            request = KINDS[job.kind].build(rng, target)
            start = time.monotonic()
            async with asyncio.timeout(ANSWER_S):
                answer = await converse(request, job.manner, rng, self.server.port, reused)
            if answer is None:
                self.tally.left[job.kind] += 1
                return
            seconds = time.monotonic() - start
            self.tally.slowest_s[job.kind] = max(self.tally.slowest_s[job.kind], seconds)
            if not self._is_interrupted(request, answer):
                self._judge(job, request, answer, before)
                return
            if not (was_updating or self._updating or self.version != before):
                self.tally.failures.append(f"{job}: refused without an update: {answer.body[:200]!r}")
                return
            self.tally.resent[job.kind] += 1
            async with self._updated:
                await self._updated.wait_for(lambda: not self._updating)
        self.tally.failures.append(f"{job}: no answer in {MAX_ATTEMPTS} attempts")

    def _is_interrupted(self, request: Request, answer: Answer) -> bool:
        """Whether it is to be sent again, since weights were on their way."""
        if answer.status in (409, 503) and answer.status not in request.statuses:
            return True
        sampled = request.sampled
        if answer.status != 200 or sampled is None or not sampled.names_weights:
            return False
        return json.loads(answer.body)["interrupted"] is not None

    def _judge(self, job: Job, request: Request, answer: Answer, before: int) -> None:
        if answer.status not in request.statuses:
            self.tally.failures.append(
                f"{job}: {answer.status}, not {sorted(request.statuses)}: {answer.body[:200]!r}"
            )
            return
        if request.sampled is not None:
            versions = range(before, self.version + 1)
            if request.sampled.names_weights:
                versions = range(before, before + 1)
                said = json.loads(answer.body)["weights"]
                if said != {"run": RUN, "version": before}:
                    self.tally.failures.append(f"{job}: asked for version {before}, got {said}")
            # An update that the server has committed, but whose answer is still on its way, counts too.
            elif self._updating:
                versions = range(before, self.version + 2)
            self.tally.completions += completions_of(request.sampled, answer.body, versions)
        self.tally.answered[job.kind] += 1


def break_update(trainer: ServerConnection, how: str, model: Any, version: int) -> None:
    """An update that does not come about: from then on the server refuses to generate.

    Raises:
        AssertionError: the server took it.
    """
    policy = PolicyWeights(versioned(model, version + 500_000))
    specs = policy.specs("float32")
    weights = Weights(run="broken", version=version)
    staging = trainer._call(Staging, "POST", BEGIN_WEIGHTS, BeginWeights(weights=weights, tensors=specs))
    assert staging.path is not None
    fill_memory(staging.path, wire.plan_buckets(specs), policy)
    if how == "it never commits":
        return
    commit = CommitWeights(weights=weights, digest="0" * wire.DIGEST_BYTES)
    try:
        trainer._call(Committed, "POST", COMMIT_WEIGHTS, commit)
    except ServerAway:
        return
    raise AssertionError("the server took weights with another digest")
