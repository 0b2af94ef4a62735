"""One process reads a model and the others get it from there, so that no machine holds it once for each of them.

Those that do not read build it without values, on torch's meta device. Called on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError
from grpo_cli.policy.model import base_model

Place = tuple[str, str]
"""Name of a module and of its attribute."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a model as rank 0 has it."""

    places: tuple[Place, ...]
    """Where it is; several where it is tied."""
    shape: torch.Size
    dtype: torch.dtype
    is_parameter: bool
    requires_grad: bool
    is_on_device: bool
    """Whether it follows the model to its device, as a parameter or buffer does."""


def match(model: nn.Module, ranks: Ranks) -> list[Entry]:
    """Give a model without values the ties, precisions and generation settings of rank 0's; return what it holds.

    Reading decides about these: weights that a file has twice are not tied, for instance.

    Raises:
        RunError: the models differ in their modules.
    """
    layout, settings = ranks.tell((_layout(model), _settings(model)) if ranks.is_main else None)
    if not any(parameter.is_meta for parameter in model.parameters()):
        return layout  # it was not built without values
    own = {place for entry in _layout(model) for place in entry.places}
    if own != {place for entry in layout for place in entry.places}:
        raise RunError(f"rank {ranks.rank} built another model than rank 0 read; are their files the same?")
    for entry in layout:
        put(model, entry, torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
    for name, value in settings.items():
        setattr(base_model(model), name, value)
    return layout


@torch.no_grad()
def hand_on(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank rank 0's values, whole and on its device, one tensor at a time."""
    if ranks.world_size == 1:
        model.to(ranks.device)
        return
    for entry in match(model, ranks):
        before = tensor_at(model, entry)
        value = broadcast(before.data if ranks.is_main else None, entry, ranks)
        if before.is_meta:
            put(model, entry, value)
        else:  # an optimizer may hold it already
            before.data = value


def broadcast(tensor: torch.Tensor | None, entry: Entry, ranks: Ranks) -> torch.Tensor:
    """Rank 0's tensor on every rank, where the entry says."""
    if tensor is None:
        value = torch.empty(entry.shape, dtype=entry.dtype, device=ranks.device)
    else:
        value = tensor.to(ranks.device).contiguous()
    ranks.copy_from_main([value])
    return value if entry.is_on_device else value.cpu()


def tensor_at(model: nn.Module, entry: Entry) -> torch.Tensor:
    """The tensor of a model that an entry describes."""
    module, name = entry.places[0]
    return getattr(model.get_submodule(module), name)


def put(model: nn.Module, entry: Entry, value: torch.Tensor) -> None:
    """Have all places of an entry hold one new tensor."""
    held = nn.Parameter(value, requires_grad=entry.requires_grad) if entry.is_parameter else value
    for module, name in entry.places:
        setattr(model.get_submodule(module), name, held)


def _layout(model: nn.Module) -> list[Entry]:
    found: dict[int, tuple[torch.Tensor, bool, list[Place]]] = {}
    for place, tensor, is_on_device in _tensors(model):
        found.setdefault(id(tensor), (tensor, is_on_device, []))[2].append(place)
    return [
        Entry(
            tuple(places), held.shape, held.dtype, isinstance(held, nn.Parameter), held.requires_grad, is_on_device
        )
        for held, is_on_device, places in found.values()
    ]


def _tensors(model: nn.Module) -> Iterator[tuple[Place, torch.Tensor, bool]]:
    """Every tensor of a model at each of its places, and whether it is a parameter or buffer."""
    for module_name, module in model.named_modules():
        registered = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        registered += [*module.named_buffers(recurse=False, remove_duplicate=False)]
        yield from (((module_name, name), tensor, True) for name, tensor in registered)
        others = [(name, value) for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
        yield from (((module_name, name), tensor, False) for name, tensor in others)


def _settings(model: Any) -> dict[str, Any]:
    """What reading a model's files sets beside its weights and configuration."""
    base = base_model(model)
    names = ("generation_config", "all_tied_weights_keys")
    return {name: getattr(base, name) for name in names if hasattr(base, name)}
