"""Fully sharded data parallelism, version 2, by torch: weights, gradients and optimizer state are shared out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies.base import (
    Compute,
    OptimizerState,
    Root,
    Strategy,
    checked_norm,
    is_elementwise,
    on_cpu,
    trained_parameters,
    without_master,
)
from grpo_cli.distributed.strategies.handing_on import broadcast, match, put, tensor_at
from grpo_cli.errors import UserError
from grpo_cli.policy.model import base_model
from grpo_cli.recipe.schema import Recipe
from grpo_cli.recipe.strategies import STRATEGIES


class FullyShardedDataParallel(Strategy):
    """Every decoder layer's weights are gathered when it computes and let go of after."""

    traits = STRATEGIES["fsdp"]

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._max_norm = recipe.optim.max_grad_norm
        self._mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        self._offload = OffloadPolicy()
        if recipe.distributed.cpu_offload:
            self._offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())

    def take(self, model: Any) -> None:
        match(model, self._ranks)  # the values come with `prepare`, straight into their shards

    def copied(self, model: Any) -> Any:
        # The copy shares the values on rank 0's CPU, which nothing writes to.
        shared = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
        return copy.deepcopy(model, shared)

    def prepare(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        if optimizer.state:
            raise UserError("optimizer: under fsdp it must be new, without a state of its own")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        held = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self._model = model
        self._root: Any = self._shard(model)
        sharded = dict(model.named_parameters())
        for group, parts in zip(optimizer.param_groups, held, strict=True):
            group["params"] = [sharded[name] for name in parts]
        self._optimizer = optimizer

    def prepare_frozen(self, model: Any) -> Compute:
        root = self._shard(model)
        return lambda compute, *arguments: root(compute, *arguments)

    def _shard(self, model: Any) -> Root:
        """The model with rank 0's values, one tensor at a time of which is whole anywhere but on rank 0."""
        layout = match(model, self._ranks)
        values = [tensor_at(model, entry).data if self._ranks.is_main else None for entry in layout]
        for entry in layout:
            put(model, entry, torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        root = Root(model)
        for layer in _decoder_layers(model):
            fully_shard(layer, mesh=self._mesh, offload_policy=self._offload)
        fully_shard(root, mesh=self._mesh, offload_policy=self._offload)
        is_offloaded = isinstance(self._offload, CPUOffloadPolicy)
        root.to_empty(device="cpu" if is_offloaded else self._ranks.device)
        for index, entry in enumerate(layout):
            value, values[index] = values[index], None
            if entry.is_parameter:
                self._fill(tensor_at(model, entry), value)
            else:
                put(model, entry, broadcast(value, entry, self._ranks))
        return root

    def run(self, compute: Compute, *arguments: Any) -> Any:
        result = self._root(compute, *arguments)
        if not torch.is_grad_enabled():
            self._root.reshard()  # what a backward pass would do; else the weights outlive their next update
        return result

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        modules = [module for module in self._root.modules() if isinstance(module, FSDPModule)]
        try:
            for module in modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            yield
        finally:
            for module in modules:
                # The root's weights stay after a forward pass by default: the backward pass begins with them.
                module.set_reshard_after_forward(not isinstance(module, Root), recurse=False)
                module.reshard()

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def zero_grad(self) -> None:
        self._root.zero_grad()

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self._ranks.world_size).backward()  # FSDP takes the mean over ranks

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(trained_parameters(self._model), self._max_norm)
        value = checked_norm(self.whole(norm))
        self._optimizer.step()
        return value

    def optimizer_state(self) -> OptimizerState:
        whole = self._optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for index, values in whole["state"].items():
            gathered = {key: self.whole(value) for key, value in values.items()}
            if self._ranks.owns(index):
                state[index] = on_cpu(gathered)
        return {"state": state, "param_groups": whole["param_groups"]}

    def restore(self, weights: Mapping[str, torch.Tensor] | None, state: OptimizerState) -> None:
        for name, parameter in self._model.named_parameters():
            wanted = self._ranks.tell(weights is None or name in weights)
            if wanted:
                self._fill(parameter, None if weights is None else weights[name])
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        state = without_master(state)
        for index, values in state["state"].items():
            for key, value in values.items():
                if is_elementwise(value):
                    values[key] = self._shared_out(value, parameters[index])
                elif isinstance(value, torch.Tensor):
                    values[key] = value.clone()  # what is read stays mapped to its file
        self._optimizer.load_state_dict(state)

    @torch.no_grad()
    def _fill(self, parameter: Any, value: torch.Tensor | None) -> None:
        """Give a parameter the value that rank 0 has, whole; the others have none."""
        if value is None:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=self._ranks.device)
        parameter.data.copy_(self._shared_out(value, parameter))

    def _shared_out(self, tensor: torch.Tensor, like: DTensor) -> DTensor:
        """Rank 0's tensor, of which every rank keeps the part that it holds of `like`."""
        on_device = tensor.to(self._ranks.device)
        return distribute_tensor(on_device, like.device_mesh, like.placements)


def _decoder_layers(model: Any) -> list[nn.Module]:
    """The largest units that the model repeats: what transformers never splits over devices."""
    names = set(getattr(base_model(model), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
