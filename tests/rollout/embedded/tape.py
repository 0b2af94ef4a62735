"""What stands in for a GPU here: operators that would make the host wait for one, and steps that are recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_cli.rollout.embedded.decode_graphs import Compute

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,  # item, bool, int, float
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
"""Operators whose result, or its size, the host must know before it can go on."""


def waits(func: Any, args: Any) -> bool:
    """Whether a GPU would have to be waited for."""
    is_indexing = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
    has_mask = is_indexing and any(index is not None and index.dtype == torch.bool for index in args[1])
    return func in WAITING or has_mask


class Waits(TorchDispatchMode):
    """Says what would have made the host wait, and when: `events` has it between the forward passes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.events: list[str] = []
        self.handle = model.register_forward_pre_hook(lambda *_: self.events.append("forward"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            self.events.append(str(func))
        return func(*args, **(kwargs or {}))

    def by_step(self) -> list[list[str]]:
        """What came before the first forward pass, and after each, before the next."""
        steps: list[list[str]] = [[]]
        for event in self.events:
            if event == "forward":
                steps.append([])
            else:
                steps[-1].append(event)
        return steps


@contextmanager
def waits_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Everything in here, `tolist` and the like included, which torch does not dispatch on a CPU."""
    with Waits(model) as seen, monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu", "__array__"):
            patch.setattr(torch.Tensor, name, _reported(getattr(torch.Tensor, name), name, seen.events))
        yield seen
    seen.handle.remove()


def _reported(method: Callable[..., Any], name: str, events: list[str]) -> Callable[..., Any]:
    def reported(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        events.append(name)
        return method(tensor, *arguments, **options)

    return reported


class Tape(TorchDispatchMode):
    """As a CUDA graph: what a step did is done again with the tensors that it was done with. The host has no say.

    Raises:
        RuntimeError: while it is recorded, the step would wait for the device.
    """

    def __init__(self, compute: Compute, output: torch.Tensor) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        with self:
            output.copy_(compute())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for new, recorded in zip(tree_leaves(again), tree_leaves(result), strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != recorded.data_ptr():
                    recorded.copy_(new)
