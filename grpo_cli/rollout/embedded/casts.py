"""Weights in the precision of a rollout: cast once, by autocast itself, for as long as the rollout lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def weights_cast_once(model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Under autocast, no gradients, and no weight cast a second time.

    Outside of inference mode autocast keeps what it casts of parameters that ask for a gradient until it is left;
    all others it casts in every forward pass. So here the frozen ones ask for one too. Tied weights are cast once.

    Args:
        model: whole on this process.
        autocast: context manager factory; where it casts nothing, nothing is kept.
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
