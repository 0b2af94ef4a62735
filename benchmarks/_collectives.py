"""Counts what processes say to each other: every collective operation of torch, whoever starts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_cli.plan.setup import Setup
from grpo_cli.plan.traffic import Work, sharing_bytes
from grpo_cli.recipe.strategies import StrategyName

NAMESPACES = ("c10d", "_c10d_functional")
SILENT = ("barrier", "monitored_barrier_", "wait_tensor")
"""Operations of these namespaces that carry nothing."""


@dataclass
class Traffic:
    """What one process took part in."""

    world_size: int
    calls: Counter[str] = field(default_factory=Counter)
    payload: Counter[str] = field(default_factory=Counter)
    """Bytes of the whole tensor that an operation sums, gathers, scatters or sends, by its name."""
    control_calls: int = 0
    control: int = 0
    """Bytes of integer tensors: pickled objects and their lengths."""

    @property
    def ring_bytes(self) -> float:
        """What passes through each process of a ring: (n-1)/n of the payload, twice where all get a sum."""
        share = (self.world_size - 1) / self.world_size
        return share * sum(passes(name) * size for name, size in self.payload.items())

    def summary(self) -> str:
        """Operations as words: `3 allreduce 22.4 MB`."""
        parts = [
            f"{self.calls[name]} {name.strip('_')} {size / 1e6:.1f} MB"
            for name, size in self.payload.most_common()
            if size >= 5e4
        ]
        small = sum(self.calls[name] for name, size in self.payload.items() if size < 5e4)
        return ", ".join([*parts, *([f"{small} of a few bytes"] if small else [])])


def passes(name: str) -> int:
    """How often the payload of an operation goes around a ring."""
    return 2 if name.startswith(("allreduce", "all_reduce")) else 1


class CollectiveCounter(TorchDispatchMode):
    """Counts while it is entered. What is computed meanwhile is slower: not for what is timed."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.traffic = Traffic(world_size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again as what it does with the parts
        result = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES and func._opname not in SILENT:
            self._count(func._opname, [*args, *([result] if func.namespace == "_c10d_functional" else [])])
        return result

    def _count(self, name: str, values: list[Any]) -> None:
        tensors = [list(_tensors(value)) for value in values]
        # Of what a process gives and what it gets, the larger is the whole.
        size = max(sum(tensor.nbytes for tensor in part) for part in tensors)
        if any(not tensor.is_floating_point() for part in tensors for tensor in part):
            self.traffic.control_calls += 1
            self.traffic.control += size
        else:
            self.traffic.calls[name] += 1
            self.traffic.payload[name] += size


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def least_ring_bytes(strategy: str, weight_bytes: int, processes: int, packs: int) -> float:
    """What one optimizer step must move through each process of a ring, given what the strategy holds in memory.

    Args:
        strategy: one of `distributed.strategy`.
        weight_bytes: of all weights, and as many of all gradients.
        processes: n.
        packs: forward and backward passes.
    """
    times = {
        "ddp": 2,  # the sum of gradients, for all
        "zero1": 2,  # the sum, of which each has its share; the updated weights
        "zero2": packs + 1,  # gradients of a pack do not stay whole
        "zero3": 3 * packs,  # weights for forward, again for backward, gradients
        "fsdp": 3 * packs,
    }
    return times[strategy] * weight_bytes * (processes - 1) / processes


def checked_ring_bytes(strategy: StrategyName, parameters: int, processes: int, packs: int) -> float:
    """What `grpo check` expects of the same step, in float32."""
    setup = Setup(
        strategy=strategy, processes=processes, weight_bytes=4, compute_bytes=4, gradient_checkpointing=False,
        cpu_offload=False, pack_tokens=1, shortest_pack=1, cached_tokens=0, cached_rows=0, engine="transformers",
        lora=None, has_reference=False,
    )  # fmt: skip
    return sharing_bytes(setup, parameters, parameters, Work(tokens=0, packs=packs, optimizer_steps=1))
