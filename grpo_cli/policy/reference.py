"""The model that the KL is measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

from grpo_cli.policy.load import Loading, load_pretrained
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.schema import ModelConfig


def reference_model(
    policy: Any, config: ModelConfig, loading: Loading, copied: Callable[[Any], Any] = copy.deepcopy
) -> Any:
    """`model.reference`, or a copy of the policy before training; None if that is the policy without its adapter.

    Args:
        policy: before training.
        config: the recipe's `model` section.
        loading: context in which a model is read.
        copied: gives a copy of the policy, or None where no process holds the whole, and it has to be read again.

    Raises:
        UserError: `model.reference` cannot be loaded.
    """
    if config.reference is not None:
        model = load_pretrained(config, config.reference, loading)
    elif isinstance(policy, PeftModel):
        return None
    elif (model := copied(policy)) is None:
        model = load_pretrained(config, config.name, loading)
    else:
        model.gradient_checkpointing_disable()
    return model.requires_grad_(False).eval()


class Reference:
    """A model of its own, or the policy with its adapter off.

    Args:
        policy: whose adapter is switched off where there is no `other`.
        other: the model of its own.
    """

    def __init__(self, policy: PackedModel, other: PackedModel | None) -> None:
        self._policy = policy
        self._own = other

    @contextmanager
    def model(self) -> Iterator[PackedModel]:
        """The reference model, for forward passes only."""
        if self._own is not None:
            yield self._own
            return
        with self._policy.model.disable_adapter():
            yield self._policy
