"""grpo-cli: train language models with GRPO from a YAML recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_cli import train as train
    from grpo_cli.recipe.schema import Recipe as Recipe
    from grpo_cli.train.callbacks import Callback as Callback
    from grpo_cli.train.callbacks import TrainState as TrainState

__all__ = ["Callback", "Recipe", "TrainState", "train"]

_HOMES = {
    "Callback": "grpo_cli.train.callbacks",
    "TrainState": "grpo_cli.train.callbacks",
    "Recipe": "grpo_cli.recipe.schema",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `grpo --help` and `grpo check` do not import torch.
    import importlib

    if name == "train":
        return importlib.import_module("grpo_cli.train")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
