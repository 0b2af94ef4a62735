"""However generating is shared out, every rank gets the same groups in the order of their prompts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError, ServerLost
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey
from grpo_cli.rollout.over_ranks import LedEngine, SplitEngine
from grpo_cli.rollout.policy_weights import PolicyWeights
from tests.conftest import tiny_llama
from tests.processes import run_processes

PATIENCE_S = 20.0

Groups = list[list[Completion]]
Seen = list[tuple[dict[str, Any], dict[str, Any]]]


def prompts(count: int) -> list[list[int]]:
    return [[index + 1] * 3 for index in range(count)]


def keys(count: int) -> list[SampleKey]:
    return [(9, index) for index in range(count)]


def group_of(prompt: Sequence[int], key: SampleKey, size: int) -> list[Completion]:
    return [Completion([prompt[0], key[1], j], [-0.5] * 3, "stop", f"{prompt}{key}{j}") for j in range(size)]


def expected_groups(count: int) -> Groups:
    return [group_of(prompt, key, 2) for prompt, key in zip(prompts(count), keys(count), strict=True)]


class FakeEngine:
    """Hands its groups out from the last to the first; says what it was asked for, and fails as it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.before: Callable[[int], None] = lambda place: None
        """Called with the place of each group before it is handed out."""

    def update_weights(self, version: int) -> int:
        self.asked.append(f"update {version}")
        return 100 * version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> Groups:
        self.asked.append(f"generate {len(prompts)}")
        groups = [group_of(prompt, key, num_generations) for prompt, key in zip(prompts, keys, strict=True)]
        for place in reversed(range(len(groups))):
            self.before(place)
            if on_group is not None:
                on_group(place, groups[place])
        return groups

    def release_memory(self) -> None:
        self.asked.append("release")

    def close(self) -> None:
        self.asked.append("close")


def raised_by(call: Callable[[], Any]) -> str:
    try:
        call()
    except RunError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing(error: Exception, at: int) -> Callable[[int], None]:
    def before(place: int) -> None:
        if place == at:
            raise error

    return before


def split_and_lead() -> tuple[dict[str, Any], dict[str, Any]]:
    ranks = Ranks.join(needs_group=False)
    return split(ranks), lead(ranks)


@pytest.fixture(scope="module")
def seen_by_rank() -> Seen:
    """What each of three ranks sees of an engine that is split, and of one that is led."""
    return run_processes(3, split_and_lead)


# Each rank generates its own


def split(ranks: Ranks) -> dict[str, Any]:
    own = FakeEngine()
    entered: list[str] = []

    @contextmanager
    def whole_model() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    engine = SplitEngine(own, ranks, whole_model)
    seen: dict[str, Any] = {"update": engine.update_weights(3)}
    reported: dict[int, list[Completion]] = {}
    seen["seven"] = engine.generate(prompts(7), keys(7), 2, on_group=reported.__setitem__)
    seen["reported"] = reported
    seen["two"] = engine.generate(prompts(2), keys(2), 2)
    seen["asked"] = list(own.asked)
    seen["entered"] = list(entered)
    own.before = failing(RunError(f"of rank {ranks.rank}"), at=0) if ranks.rank else own.before
    seen["error"] = raised_by(lambda: engine.generate(prompts(7), keys(7), 2))
    own.before = lambda place: None
    seen["after"] = engine.generate(prompts(3), keys(3), 2)
    own.asked.clear()
    engine.release_memory()
    engine.close()
    seen["asked last"] = own.asked
    return seen


@pytest.mark.slow
def test_ranks_that_generate_their_own_share_give_all_of_them_all_groups(seen_by_rank: Seen) -> None:
    for rank, (seen, _) in enumerate(seen_by_rank):
        assert seen["update"] == 300
        assert seen["seven"] == expected_groups(7)
        own = [index for index in range(7) if index % 3 == rank]
        assert seen["reported"] == {index: expected_groups(7)[index] for index in own}
        assert list(seen["reported"]) == own[::-1], "as they are finished"
        assert seen["two"] == expected_groups(2)
        assert seen["asked"] == ["update 3", f"generate {len(own)}", *(["generate 1"] if rank < 2 else [])]
        assert seen["entered"] == ["in", "out"] * 2, "by all ranks, whether or not they have something to do"
        assert seen["error"] == "RunError: of rank 1"
        assert seen["after"] == expected_groups(3)
        assert seen["asked last"] == ["release", "close"]


# Rank 0 speaks with the servers


class SummedOverRanks:
    """Weights of which every rank holds a summand."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def gathered(self, tensors: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        return nullcontext()

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.ranks.sum(tensor.clone())

    def whole_shape(self, tensor: torch.Tensor) -> torch.Size:
        return tensor.shape


class SendingEngine(FakeEngine):
    """Sends the weights to some servers at once, as the client of several rollout servers does."""

    def __init__(self, policy: PolicyWeights, num_servers: int) -> None:
        super().__init__()
        self.policy = policy
        self.num_servers = num_servers
        self.received: list[dict[str, torch.Tensor]] = []

    def update_weights(self, version: int) -> int:
        names = [spec.name for spec in self.policy.specs("float32")]
        barrier = threading.Barrier(self.num_servers)

        def send(start: int) -> dict[str, torch.Tensor]:
            """In buckets of three, each server's beginning elsewhere, so that no two ask for the same."""
            own = names[start:] + names[:start]
            received: dict[str, torch.Tensor] = {}
            barrier.wait(PATIENCE_S)
            for first in range(0, len(own), 3):
                bucket = own[first : first + 3]
                with self.policy.gathered(bucket) as tensor:
                    received |= {name: tensor(name) for name in bucket}
            return received

        with ThreadPoolExecutor(self.num_servers) as threads:
            self.received = list(threads.map(send, range(self.num_servers)))
        return super().update_weights(version)


def lead(ranks: Ranks) -> dict[str, Any]:
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(ranks.rank + 1)
    policy = PolicyWeights(model, SummedOverRanks(ranks))
    own = SendingEngine(policy, num_servers=4) if ranks.is_main else None
    engine = LedEngine(own, ranks, policy)
    seen: dict[str, Any] = {"update": engine.update_weights(3)}
    sets = [] if own is None else own.received
    whole = {name: 6 * tensor for name, tensor in tiny_llama().state_dict().items()}
    seen["received"] = [_same(received, whole) for received in sets]

    reported: list[int] = []
    seen["groups"] = engine.generate(prompts(5), keys(5), 2, on_group=lambda index, _: reported.append(index))
    seen["reported"] = reported
    seen["without on_group"] = engine.generate(prompts(2), keys(2), 2)

    if own is not None:  # a server is lost in the middle, and given its weights again
        own.before = lambda place: own.update_weights(4) and None if place == 2 else None
    seen["groups after a loss"] = engine.generate(prompts(5), keys(5), 2)
    seen["received again"] = [] if own is None else [_same(received, whole) for received in own.received]

    def on_group(index: int, group: list[Completion]) -> None:
        if ranks.is_main and index == 1:
            raise RunError("a reward function failed")

    seen["error of a report"] = raised_by(lambda: engine.generate(prompts(5), keys(5), 2, on_group=on_group))
    if own is not None:
        own.before = failing(ServerLost("all servers are away"), at=3)
        own.asked.clear()
    seen["error"] = raised_by(lambda: engine.generate(prompts(5), keys(5), 2))
    if own is not None:
        own.update_weights = failing(ServerLost("away again"), at=5)  # type: ignore[method-assign,assignment]
    seen["error of an update"] = raised_by(lambda: engine.update_weights(5))
    if own is not None:  # a thread that still sends to a server that was given up
        late = policy.gathered([policy.specs("float32")[0].name])
        seen["late"] = raised_by(late.__enter__)
    engine.release_memory()
    engine.close()
    seen["asked last"] = None if own is None else own.asked
    seen["in step"] = ranks.gather(ranks.rank)
    return seen


def _same(received: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> bool:
    return received.keys() == whole.keys() and all(
        torch.allclose(received[name], whole[name], rtol=1e-6) for name in whole
    )


@pytest.mark.slow
def test_ranks_that_are_led_help_to_gather_weights_and_are_told_what_came(seen_by_rank: Seen) -> None:
    for rank, (_, seen) in enumerate(seen_by_rank):
        assert seen["update"] == 300
        assert seen["received"] == seen["received again"] == ([True] * 4 if rank == 0 else [])
        assert seen["groups"] == seen["groups after a loss"] == expected_groups(5)
        assert seen["without on_group"] == expected_groups(2)
        assert seen["reported"] == [4, 3, 2, 1, 0], "on every rank, as they are finished"
        assert seen["error of a report"] == "RunError: a reward function failed"
        assert seen["error"] == "ServerLost: all servers are away"
        assert seen["error of an update"] == "ServerLost: away again"
        assert seen["asked last"] == (["generate 5", "release", "close"] if rank == 0 else None)
        assert seen.get("late", "RunError").startswith("RunError")
        assert seen["in step"] == [0, 1, 2], "no rank is left with a message of another"


def test_a_process_alone_may_split_or_lead_itself() -> None:
    ranks, policy = Ranks(), PolicyWeights(tiny_llama())
    for engine in (SplitEngine(FakeEngine(), ranks, nullcontext), LedEngine(FakeEngine(), ranks, policy)):
        reported: list[int] = []
        groups = engine.generate(prompts(4), keys(4), 2, on_group=lambda index, _, r=reported: r.append(index))
        assert groups == expected_groups(4)
        assert reported == [3, 2, 1, 0]
        assert engine.update_weights(2) == 200
