"""Rollout engines over several processes: all ranks ask for the same groups, and all get all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from grpo_cli.data.prompts import Prompt
from grpo_cli.distributed.outcome import outcome_of, result_of
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError
from grpo_cli.rollout.engine import Completion, OnGroup, RolloutEngine, SampleKey
from grpo_cli.rollout.policy_weights import PolicyWeights

T = TypeVar("T")


class SplitEngine:
    """Each rank generates the groups that it owns, with an engine of its own.

    `on_group` is called for those alone.

    Args:
        engine: of this rank.
        ranks: all of them.
        whole_model: context in which this rank may run the policy by itself.
    """

    def __init__(
        self, engine: RolloutEngine, ranks: Ranks, whole_model: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._whole_model = whole_model

    def update_weights(self, version: int) -> int:
        """See `RolloutEngine.update_weights`."""
        return self._engine.update_weights(version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        own = [index for index in range(len(prompts)) if self._ranks.owns(index)]

        def finished(place: int, group: list[Completion]) -> None:
            assert on_group is not None
            on_group(own[place], group)

        def generate_own() -> list[list[Completion]]:
            if not own:
                return []
            return self._engine.generate(
                [prompts[index] for index in own],
                [keys[index] for index in own],
                num_generations,
                on_group=None if on_group is None else finished,
            )

        with self._whole_model():
            there: list[list[Completion]] = []

            def without_environments() -> list[list[Completion]]:
                there.extend(generate_own())
                return [without_environment(group) for group in there]

            parts = self._ranks.together(without_environments)
        parts[self._ranks.rank] = there
        return [parts[index % len(parts)][index // len(parts)] for index in range(len(prompts))]

    def release_memory(self) -> None:
        """See `RolloutEngine.release_memory`."""
        self._engine.release_memory()

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._engine.close()


def without_environment(group: Sequence[Completion]) -> list[Completion]:
    """A group as other ranks are told of it: an environment stays in the process that played it."""
    return [
        completion if completion.environment is None else replace(completion, environment=None)
        for completion in group
    ]


class LedEngine:
    """Rank 0 speaks with the rollout servers; the others help to gather weights, and are told what came.

    What rank 0 needs of the others, it does not know beforehand: a server that is lost in the middle of a rollout
    is sent all weights again. So while rank 0 is at work, the others do as they are told.

    Args:
        engine: made by rank 0 alone.
        ranks: all of them.
        policy: the weights that are sent.
    """

    def __init__(self, engine: RolloutEngine | None, ranks: Ranks, policy: PolicyWeights) -> None:
        self._engine = engine
        self._ranks = ranks
        self._policy = policy
        self._lock = threading.Lock()  # several servers may be sent weights at the same time
        self._is_heard = False  # whether the others do as they are told
        if engine is not None:
            policy.announce = self._announce

    @contextmanager
    def _announce(self, names: Sequence[str]) -> Iterator[None]:
        """Have the others gather these weights, too.

        Raises:
            RunError: they have gone on; this comes from a thread that sends to a server that was given up.
        """
        with self._lock:
            if not self._is_heard:
                raise RunError("the other ranks do not gather weights any more")
            self._ranks.tell(("gather", list(names)))
            yield

    def update_weights(self, version: int) -> int:
        """See `RolloutEngine.update_weights`."""
        return self._led(lambda engine: engine.update_weights(version))

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        groups: list[list[Completion]] = [[] for _ in prompts]

        def came(index: int, group: list[Completion]) -> None:
            groups[index] = group
            if on_group is not None:
                on_group(index, group)

        def tell(index: int, group: list[Completion]) -> None:
            with self._lock:
                self._ranks.tell(("group", (index, without_environment(group))))
            came(index, group)

        def generate(engine: RolloutEngine) -> None:
            engine.generate(prompts, keys, num_generations, on_group=tell)

        self._led(generate, came)
        return groups

    def _led(self, work: Callable[[RolloutEngine], T], came: OnGroup | None = None) -> T:
        """What `work` gives or raises on rank 0, on all ranks."""
        engine = self._engine
        if engine is None:
            return result_of(self._follow(came))
        self._is_heard = True
        outcome = outcome_of(lambda: work(engine))
        with self._lock:
            self._is_heard = False
            self._ranks.tell(("done", outcome))
        return result_of(outcome)

    def _follow(self, came: OnGroup | None) -> Any:
        """Do what rank 0 asks for until it is done."""
        while True:
            message: tuple[str, Any] = self._ranks.tell()
            request, value = message
            if request == "done":
                return value
            if request == "gather":
                self._policy.join_gathering(value)
            else:
                assert came is not None
                came(*value)

    def release_memory(self) -> None:
        """See `RolloutEngine.release_memory`."""
        if self._engine is not None:
            self._engine.release_memory()

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        if self._engine is not None:
            self._engine.close()
