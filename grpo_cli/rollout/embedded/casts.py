"""Casts the weights to the precision of generation once for a whole rollout, and not in every forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def weights_cast_once(model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside, autocast is on, no gradients are recorded, and each weight is cast once.

    Autocast keeps the cast copy of a parameter until it is left, but only if the parameter requires a gradient; it
    casts every other one anew in each forward pass. So frozen parameters are made to require one meanwhile.

    Args:
        model: whole on this process.
        autocast: context manager factory.
    """
    frozen = [
        parameter
        for parameter in model.parameters()
        if parameter.is_floating_point() and not parameter.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.no_grad(), autocast():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
