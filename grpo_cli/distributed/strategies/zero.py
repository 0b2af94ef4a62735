"""ZeRO by DeepSpeed: optimizer state, gradients and weights are shared out over processes (arXiv:1910.02054)."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from grpo_cli.distributed.ranks import Ranks, current_device
from grpo_cli.distributed.strategies.base import (
    MASTER,
    Compute,
    OptimizerState,
    Root,
    Strategy,
    checked_norm,
    is_elementwise,
    on_cpu,
)
from grpo_cli.distributed.strategies.deepspeed_config import deepspeed_config
from grpo_cli.distributed.strategies.handing_on import hand_on
from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import ModelConfig, Recipe
from grpo_cli.recipe.strategies import StrategyTraits

FLAT_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
"""Names of what DeepSpeed's optimizers step on: float32 originals of a rank's share, flat."""

ELEMENTWISE = (
    torch.optim.AdamW,
    torch.optim.Adam,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
)
"""Optimizers for which it does not matter where one parameter ends and the next begins."""


class Zero(Strategy):
    """ZeRO stage 1, 2 or 3, as the traits say.

    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, traits: StrategyTraits) -> None:
        super().__init__(ranks)
        assert traits.zero_stage is not None
        self.traits = traits
        self._deepspeed = _import_deepspeed()
        self._recipe = recipe
        self._stage = traits.zero_stage

    def loading(self, config: ModelConfig) -> AbstractContextManager[bool]:
        if not self.shards_weights:
            return super().loading(config)
        # It is shared out while all ranks read it, since no process may have room for the whole.
        is_gguf = config.gguf_file is not None or config.name.endswith(".gguf")
        return nullcontext(True) if is_gguf else self._read_in_parts()

    def take(self, model: Any) -> None:
        if not self.shards_weights:
            hand_on(model, self._ranks)
        elif not _is_in_parts(model):
            self._ranks.copy_from_main([*model.parameters(), *model.buffers()])

    def copied(self, model: Any) -> Any:
        return None if _is_in_parts(model) else copy.deepcopy(model)

    @contextmanager
    def _read_in_parts(self) -> Iterator[bool]:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        # from_pretrained asks for it while it lives.
        config = HfDeepSpeedConfig(deepspeed_config(self._recipe, self._stage))
        try:
            yield True
        finally:
            unset_hf_deepspeed_config()
            del config

    def prepare(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, ELEMENTWISE):
            raise UserError(
                f"optim.name: {type(optimizer).__name__} is not known to treat each weight by itself, as "
                f"zero{self._stage} needs, which shares weights out flat; use ddp or fsdp, or one of "
                f"{', '.join(kind.__name__ for kind in ELEMENTWISE)}"
            )
        self._model = model
        self._base_optimizer = optimizer
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
        self._engine, *_ = self._deepspeed.initialize(
            model=Root(model), optimizer=optimizer, config=deepspeed_config(self._recipe, self._stage)
        )

    def prepare_frozen(self, model: Any) -> Compute | None:
        if not self.shards_weights:
            hand_on(model, self._ranks)
            return None
        engine, *_ = self._deepspeed.initialize(
            model=Root(model), config=deepspeed_config(self._recipe, self._stage)
        )
        return lambda compute, *arguments: engine(_as_outside(compute, self._ranks.device), *arguments)

    def run(self, compute: Compute, *arguments: Any) -> Any:
        return self._engine(_as_outside(compute, self._ranks.device), *arguments)

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        if not self.shards_weights:
            yield
            return
        # The hooks that fetch a layer's weights and let them go again would fight with those that stay.
        offload = self._engine.optimizer.parameter_offload
        # DeepSpeed has put another function in the place of torch's, whose weights autocast casts at every call.
        functions: Any = torch.nn.functional
        linear = functions.linear
        with self._deepspeed.zero.GatheredParameters(list(self._model.parameters())):
            offload._remove_module_hooks()
            functions.linear = torch._C._nn.linear
            try:
                yield
            finally:
                functions.linear = linear
                offload._register_deepspeed_module(offload.module)

    def gathered(self, tensors: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        if not self.shards_weights:
            return super().gathered(tensors)
        in_parts = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
        return self._deepspeed.zero.GatheredParameters(in_parts)

    def whole_shape(self, tensor: torch.Tensor) -> torch.Size:
        return getattr(tensor, "ds_shape", tensor.shape)

    def zero_grad(self) -> None:
        """DeepSpeed's steps end with it."""

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss * self._ranks.world_size)  # DeepSpeed takes the mean over ranks

    def step(self) -> float:
        # Where the norm is not finite, DeepSpeed lets go of the gradient, steps nothing, and says that it is inf.
        self._engine.step()
        return checked_norm(self._engine.get_global_grad_norm())

    def optimizer_state(self) -> OptimizerState:
        """Each parameter's state is put together by all ranks, and kept by one of them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_state()
        has_master = self._recipe.model.dtype != "float32"
        flat = self._flat_partitions()[0]
        example = self._base_optimizer.state.get(flat, {})
        state: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(self._parameters):
            values: dict[str, Any] = {}
            for key, value in example.items():
                values[key] = safe_get_full_optimizer_state(parameter, key) if is_elementwise(value) else value
            if has_master:
                values[MASTER] = safe_get_full_fp32_param(parameter)
            if self._ranks.owns(index):
                state[index] = on_cpu(values)
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": numbers}
            for group, numbers in zip(self._base_optimizer.param_groups, self._numbers, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def restore(self, weights: Mapping[str, torch.Tensor] | None, state: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._make_state(state["state"])
        self._link_state()
        numbers = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        names = set(self._ranks.tell(None if weights is None else list(weights)))
        for name, parameter in self._model.named_parameters():
            with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
                if weights is not None and name in weights:
                    parameter.data.copy_(weights[name])
            if not self.shards_weights and name in names:
                self._ranks.copy_from_main([parameter])
            index = numbers.get(id(parameter))
            if index is None:
                continue
            values = dict(state["state"].get(index, {}))
            with self.gathered([parameter]):
                master = values.pop(MASTER, parameter.data)
                safe_set_full_fp32_param(parameter, master.to(parameter.device).float())
            for key, value in values.items():
                if is_elementwise(value):
                    safe_set_full_optimizer_state(parameter, value, key)
        for group, saved in zip(self._base_optimizer.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def _make_state(self, saved: Mapping[int, Mapping[str, Any]]) -> None:
        """Give the optimizer the state that it makes at its first step, to be filled."""
        if not saved:
            return
        example = {key: value for key, value in next(iter(saved.values())).items() if key != MASTER}
        for flat in self._flat_partitions():
            self._base_optimizer.state[flat] = {
                key: torch.zeros_like(flat) if is_elementwise(value) else copy.deepcopy(value)
                for key, value in example.items()
            }

    def _link_state(self) -> None:
        """Have DeepSpeed find each parameter's state: by itself it looks when only the first group has one."""
        if not self.shards_weights:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_partitions(self) -> list[torch.Tensor]:
        optimizer = self._engine.optimizer
        name = next(name for name in FLAT_PARTITIONS if hasattr(optimizer, name))
        return getattr(optimizer, name)


def _is_in_parts(model: torch.nn.Module) -> bool:
    """Whether DeepSpeed has shared the weights out, so that a parameter is whole only where it is gathered."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _as_outside(compute: Compute, device: torch.device) -> Compute:
    """`compute` under the autocast that is on now: inside its engine DeepSpeed switches it off."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def inside(*arguments: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype, enabled=enabled):
            return compute(*arguments)

    return inside


def _import_deepspeed() -> Any:
    """DeepSpeed, kept from compiling anything on a CPU and from printing at every start."""
    os.environ.setdefault("LOCAL_RANK", str(current_device().index or 0))  # of the GPU that it computes on
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            "distributed.strategy: zero1, zero2 and zero3 need DeepSpeed: pip install 'grpo-cli[deepspeed]'\n"
            f"({error})"
        ) from error
    if not torch.cuda.is_available():
        # Communication through shared memory would be compiled for a minute, and gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
