"""The strategies of `distributed.strategy`, and every fact about them that is needed outside of their classes.

Whoever needs such a fact asks this table and compares no names, so that a new strategy is a row here, a class in
`distributed/strategies/` and a line in `make_strategy`. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

StrategyName = Literal["none", "ddp", "fsdp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class StrategyTraits:
    """What a strategy shares out over processes, and what that asks of the rest of the program."""

    for_one_process: bool = False
    shards_optimizer: bool = False
    """Whether each rank holds a part of the optimizer's state only; likewise of gradients and of weights."""
    shards_gradients: bool = False
    shards_weights: bool = False
    zero_stage: int | None = None
    """Which stage of DeepSpeed's ZeRO it is; None where DeepSpeed has no part in it."""
    runs_alike: bool = False
    """Whether all ranks must run the same number of forward and backward passes."""
    needs_group: bool = False
    """Whether a process alone needs a process group, too."""
    can_offload: bool = False
    """Whether `distributed.cpu_offload` can be used with it."""

    @property
    def uses_deepspeed(self) -> bool:
        return self.zero_stage is not None


def _sharding(*, gradients: bool, weights: bool, zero_stage: int | None = None) -> StrategyTraits:
    """Traits of a strategy that shares out the optimizer's state at least."""
    return StrategyTraits(
        shards_optimizer=True, shards_gradients=gradients, shards_weights=weights, zero_stage=zero_stage,
        runs_alike=True, needs_group=True, can_offload=True,
    )  # fmt: skip


STRATEGIES: dict[StrategyName, StrategyTraits] = {
    "none": StrategyTraits(for_one_process=True),
    "ddp": StrategyTraits(),
    "zero1": _sharding(gradients=False, weights=False, zero_stage=1),
    "zero2": _sharding(gradients=True, weights=False, zero_stage=2),
    "zero3": _sharding(gradients=True, weights=True, zero_stage=3),
    "fsdp": _sharding(gradients=True, weights=True),
}


def names_of(has_trait: Callable[[StrategyTraits], bool], conjunction: str) -> str:
    """For messages: the names of the strategies that have a trait, such as `zero1, zero2 or zero3`."""
    *first, last = [name for name, traits in STRATEGIES.items() if has_trait(traits)]
    return f"{', '.join(first)} {conjunction} {last}"
