"""What one rank knows, all know: values, errors, and nothing of what is a rank's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import EXPECTED_ERRORS, RunError, ServerLost, StoppedEarly, UserError
from grpo_cli.reward.scorer import RewardError
from tests.processes import run_processes


def fail(error: Exception) -> Callable[[], Any]:
    def work() -> None:
        raise error

    return work


# A process alone


def test_a_process_alone_is_all_ranks() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    assert all(ranks.owns(index) for index in range(5))
    value = object()
    assert ranks.gather(value) == [value], "nothing is copied"
    assert ranks.tell(value) is value
    assert ranks.together(lambda: value) == [value]
    assert ranks.led(lambda: value) is value
    values = torch.ones(3)
    assert ranks.sum(values) is values
    assert values.tolist() == [1, 1, 1]


@pytest.mark.parametrize("error", [UserError("u"), RunError("r"), StoppedEarly("s"), KeyError("k")], ids=repr)
def test_a_process_alone_meets_its_own_errors(error: Exception) -> None:
    for call in (Ranks().together, Ranks().led):
        with pytest.raises(type(error)) as caught:
            call(fail(error))
        assert caught.value is error


def test_a_process_that_no_launcher_started_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks.join(needs_group=False)
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert not torch.distributed.is_initialized()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch says of CUDA where there are two; the numbers of the devices that were made current."""
    chosen = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device("cuda", device).index))
    return chosen


def test_one_process_on_a_gpu_names_its_device(two_gpus: list[int]) -> None:
    assert Ranks().device == torch.device("cuda", 0)
    assert Ranks.join(needs_group=False).device == torch.device("cuda", 0)


def test_one_process_computes_on_the_device_that_its_caller_chose(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[Any] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: groups.append(args))
    two_gpus.append(1)
    assert Ranks().device == torch.device("cuda", 1)
    for needs_group in (False, True):
        assert Ranks.join(needs_group=needs_group).device == torch.device("cuda", 1)
    assert groups == [("cpu:gloo,cuda:nccl",)]
    assert two_gpus == [0, 1], "nobody chose another one"


def test_a_launched_process_makes_the_device_of_its_local_rank_the_current_one(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("grpo_cli.distributed.ranks._meeting_point", lambda place: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **kwargs: "talk")
    assert Ranks.join(needs_group=False).device == torch.device("cuda", 1)
    assert two_gpus == [0, 1]


# Three processes


def caught(call: Callable[[], Any]) -> tuple[str, str] | None:
    """Type and message of the expected error that `call` raises."""
    try:
        call()
    except EXPECTED_ERRORS as error:
        return type(error).__name__, str(error)
    return None


def speak() -> dict[str, Any]:
    """What a rank sees of everything that ranks say to each other."""
    ranks = Ranks.join(needs_group=False)
    rank = ranks.rank
    seen: dict[str, Any] = {"place": (rank, ranks.world_size, ranks.is_main, ranks.device.type)}
    seen["owned"] = [index for index in range(7) if ranks.owns(index)]
    seen["gathered"] = ranks.gather({"rank": rank, "long": "x" * 100_000 * rank})
    seen["told"] = ranks.tell(("from", rank))
    seen["told by those without a value"] = ranks.tell("a value" if ranks.is_main else None)
    seen["sum"] = [
        ranks.sum(torch.arange(4, dtype=dtype) * (rank + 1)).tolist() for dtype in (torch.float32, torch.int64)
    ]
    own = torch.full((2, 2), float(rank))
    assert ranks.sum(own) is own
    seen["sum in place"] = own.tolist()
    seen["together"] = ranks.together(lambda: 10 * rank)
    worked: list[int] = []
    seen["led"] = ranks.led(lambda: worked.append(rank) or f"by {rank}")
    seen["worked"] = worked

    seen["error of one"] = caught(lambda: ranks.together(fail(RewardError("the disk")) if rank == 1 else int))
    errors = [RunError("0"), UserError("1"), StoppedEarly("2")]
    seen["error of some"] = caught(lambda: ranks.together(fail(errors[rank]) if rank else int))
    seen["error of the leader"] = caught(lambda: ranks.led(fail(ServerLost(f"of {rank}"))))
    seen["after errors"] = ranks.gather(rank)

    # An unexpected error is not told: the rank that has it goes on by itself, here to what it says next.
    if rank == 2:
        with pytest.raises(ZeroDivisionError):
            ranks.together(lambda: 1 // 0)
        ranks.gather("something else")
    else:
        seen["unexpected error elsewhere"] = ranks.together(lambda: rank)
    return seen


@pytest.mark.slow
def test_what_several_ranks_say_and_raise_reaches_all_of_them() -> None:
    seen = run_processes(3, speak)
    assert [one["place"] for one in seen] == [(rank, 3, rank == 0, "cpu") for rank in range(3)]
    assert [one["owned"] for one in seen] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [one["worked"] for one in seen] == [[0], [], []]
    same = {
        "gathered": [{"rank": rank, "long": "x" * 100_000 * rank} for rank in range(3)],
        "told": ("from", 0),
        "told by those without a value": "a value",
        "sum": [[0, 6, 12, 18], [0, 6, 12, 18]],
        "sum in place": [[3, 3], [3, 3]],
        "together": [0, 10, 20],
        "led": "by 0",
        "error of one": ("RewardError", "the disk"),
        "error of some": ("UserError", "1"),
        "error of the leader": ("ServerLost", "of 0"),
        "after errors": [0, 1, 2],
    }
    for rank, one in enumerate(seen):
        assert {key: one[key] for key in same} == same, f"rank {rank}"
    for one in seen[:2]:
        assert one["unexpected error elsewhere"] == [0, 1, "something else"]
