"""Every process holds the whole policy and optimizer; gradients are summed once for each optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies.base import (
    OptimizerState,
    Strategy,
    checked_norm,
    on_cpu,
    part_of_state,
    trained_parameters,
    without_master,
)
from grpo_cli.distributed.strategies.handing_on import hand_on
from grpo_cli.recipe import limits
from grpo_cli.recipe.strategies import STRATEGIES


class Replicated(Strategy):
    """One process, or data parallelism over several.

    torch's DistributedDataParallel is not used: it wants as many backward passes on every rank, each of them
    through every parameter, and its gain, to send while the last of many packs is computed, is small here.
    """

    traits = STRATEGIES["ddp"]

    def __init__(self, ranks: Ranks, max_grad_norm: float) -> None:
        super().__init__(ranks)
        self._max_norm = max_grad_norm

    def take(self, model: Any) -> None:
        hand_on(model, self._ranks)

    def prepare(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self._model = model.to(self._ranks.device)
        self._optimizer = optimizer

    def prepare_frozen(self, model: Any) -> None:
        hand_on(model, self._ranks)

    def zero_grad(self) -> None:
        self._model.zero_grad()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        trained: list[Any] = trained_parameters(self._model)
        if self._ranks.world_size > 1:
            sum_over_ranks([parameter.grad for parameter in trained])
        norm = checked_norm(torch.nn.utils.clip_grad_norm_(trained, self._max_norm))
        self._optimizer.step()
        return norm

    def optimizer_state(self) -> OptimizerState:
        return part_of_state(self._optimizer.state_dict(), self._ranks.rank, self._ranks.world_size)

    def restore(self, weights: Mapping[str, torch.Tensor] | None, state: OptimizerState) -> None:
        names = self._ranks.tell(None if weights is None else list(weights))
        if weights is not None:
            self._model.load_state_dict(weights, strict=False)
        held = self._model.state_dict(keep_vars=True)
        self._ranks.copy_from_main(held[name] for name in names if name in held)
        # Copied, since what is read stays mapped to its file.
        own = {index: on_cpu(values) for index, values in without_master(state)["state"].items()}
        self._optimizer.load_state_dict({"state": own, "param_groups": state["param_groups"]})


def sum_over_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors by their sums over all ranks, which are the same to the bit on each."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype, up to GRADIENT_BUCKET_BYTES."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > limits.GRADIENT_BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
