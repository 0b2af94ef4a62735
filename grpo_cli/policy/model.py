"""A transformers model, or the PEFT wrapper around one: its parts, and the modes that it can be in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel


def base_model(model: Any) -> Any:
    """The transformers model itself, inside its adapters if it has any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def without_dropout(model: Any) -> None:
    """Switch dropout and routing noise off: with them, the policy that is trained is not the one that sampled."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without an adapter's dropout, for as long as it is entered."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
