"""What a model is outside of training: tensors under a checkpoint's names, and the files that hold them.

Rollout servers, `final/` and the checkpoints of whole models walk over one list, `exported_tensors`: adapters are
merged, and a weight that the model has under two names is listed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from grpo_cli.policy.model import base_model


class Sharding(Protocol):
    """How weights that are shared out over processes are put together. All ranks make the same calls in turn."""

    def gathered(self, tensors: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        """Inside, these parameters can be read through `whole`."""
        return nullcontext()

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter, or what was computed of some."""
        return tensor

    def whole_shape(self, tensor: torch.Tensor) -> torch.Size:
        """Of a parameter, without putting it together."""
        return tensor.shape


class Unsharded(Sharding):
    """For weights that this process holds whole."""


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the model as others see it. It is computed when it is asked for, from the weights of then."""

    name: str
    origin: torch.Tensor
    """The parameter or buffer of its shape and dtype: the one that an adapter changes, if there is one."""
    behind: tuple[torch.Tensor, ...]
    """All parameters and buffers that it is computed from."""
    compute: Callable[[], torch.Tensor]
    """Gives the tensor without a gradient, or this rank's part of it where weights are shared out."""
    is_parted: bool = False
    """Whether the model ties it to another tensor, but an adapter has made the two differ."""


def exported_tensors(model: Any) -> list[ExportedTensor]:
    """The tensors of a model without adapters that computes what `model` does; of tied ones only the first."""
    base = base_model(model)
    tensors: dict[str, ExportedTensor] = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            tensors[f"{name}.weight"] = _merged(f"{name}.weight", module)
            bias = getattr(module.get_base_layer(), "bias", None)
            if bias is not None:
                tensors[f"{name}.bias"] = _as_it_is(f"{name}.bias", bias)
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]].state_dict(keep_vars=True)
            tensors |= {f"{name}.{key}": _as_it_is(f"{name}.{key}", value) for key, value in trained.items()}
    adapter_parts = (".lora_", ".base_layer.", ".modules_to_save.", ".original_module.")
    for key, value in base.state_dict(keep_vars=True).items():
        if key not in tensors and not any(part in key for part in adapter_parts):
            tensors[key] = _as_it_is(key, value)
    exported = dict(tensors)
    for name, source in getattr(base, "all_tied_weights_keys", {}).items():
        if name in tensors and source in tensors:
            if list(map(id, tensors[name].behind)) == list(map(id, tensors[source].behind)):
                del exported[name]
            else:
                exported[name] = replace(tensors[name], is_parted=True)
    return list(exported.values())


def _as_it_is(name: str, tensor: torch.Tensor) -> ExportedTensor:
    return ExportedTensor(name, tensor, (tensor,), tensor.detach)


def _merged(name: str, layer: Any) -> ExportedTensor:
    """The weight of a layer with its adapters' products added."""

    @torch.no_grad()
    def compute() -> torch.Tensor:
        weight: torch.Tensor = layer.get_base_layer().weight
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        return weight

    return ExportedTensor(name, layer.get_base_layer().weight, tuple(layer.parameters()), compute)


@contextmanager
def gathered(tensors: Sequence[ExportedTensor], sharding: Sharding) -> Iterator[Callable[[str], torch.Tensor]]:
    """Gives a function of a tensor's name, to be asked for each of them once and in this order on all ranks.

    What it gives may be lost when the context is left, and carries no gradient.
    """
    left = {tensor.name: tensor for tensor in tensors}

    def whole(name: str) -> torch.Tensor:
        return sharding.whole(left.pop(name).compute())

    with sharding.gathered([part for tensor in tensors for part in tensor.behind]):
        try:
            yield whole
        finally:
            # Where each of them takes all ranks, the others are waiting for those that an error left over.
            for name in list(left):
                whole(name)


def gathered_weights(model: Any, sharding: Sharding, is_main: bool) -> dict[str, torch.Tensor]:
    """What `save_weights` writes; see `gathered_standalone`."""
    if not isinstance(model, PeftModel):
        return gathered_standalone(model, sharding, is_main)
    state = model.state_dict(keep_vars=True).items()
    return _on_cpu([_as_it_is(name, value) for name, value in state if value.requires_grad], sharding, is_main)


def gathered_standalone(model: Any, sharding: Sharding, is_main: bool) -> dict[str, torch.Tensor]:
    """What `save_standalone` writes, on rank 0's CPU, and nothing on the others.

    Called on all ranks alike; one weight at a time is whole on the devices.
    """
    return _on_cpu(exported_tensors(model), sharding, is_main)


def _on_cpu(tensors: Sequence[ExportedTensor], sharding: Sharding, is_main: bool) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        with gathered([tensor], sharding) as whole:
            value = whole(tensor.name)
            if is_main:
                kept[tensor.name] = value.to("cpu", copy=True)
    return kept


def save_weights(model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write what is trained: the whole model, or the adapter alone; from `state` where the model is not whole."""
    if isinstance(model, PeftModel):
        # By default PEFT asks the Hub, at every save, whether the embeddings have grown.
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
    else:
        model.save_pretrained(folder, state_dict=state)


def saved_weights(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What `save_weights` wrote, under the names that the parameters of `model` have.

    Raises:
        ValueError: a weight that is trained is not among them.
    """
    if isinstance(model, PeftModel):
        saved = load_peft_weights(str(folder), device="cpu")
        own = model.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in own.items()}
        as_saved = get_peft_model_state_dict(model, own, save_embedding_layers=False)
        weights = {names[id(tensor)]: saved[key] for key, tensor in as_saved.items() if key in saved}
    else:
        weights = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and n not in weights]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}")
    return weights


def save_standalone(
    model: Any, tokenizer: Any, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write a model that plain transformers and vLLM load as it is: adapters merged, trained weights untouched.

    Args:
        model: the policy.
        tokenizer: written beside it.
        folder: that is there.
        state: of `gathered_standalone`, where the model is not whole here; it is emptied.
    """
    base, tensors = base_model(model), exported_tensors(model)
    if isinstance(model, PeftModel) and state is None:
        # On the CPU: there need not be room for a second model on the device.
        state = {tensor.name: tensor.compute().cpu() for tensor in tensors}
    base.save_pretrained(folder, state_dict=state)
    if any(tensor.is_parted for tensor in tensors):  # vLLM goes by what the configuration says
        config = copy.deepcopy(base.config)
        config.tie_word_embeddings = False
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
