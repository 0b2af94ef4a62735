"""The model that the KL is measured against."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel

from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.model import load_pretrained
from grpo_cli.recipe.schema import ModelConfig


class Reference:
    """Another model, a copy of the start policy, or the policy with its adapter off.

    Args:
        policy: as it is before training, on its device.
        config: the recipe's `model` section.

    Raises:
        UserError: `model.reference` cannot be loaded.
    """

    def __init__(self, policy: PackedModel, config: ModelConfig) -> None:
        self._policy = policy
        self._own: PackedModel | None = None
        if config.reference is not None:
            model = load_pretrained(config, config.reference)
        elif isinstance(policy.model, PeftModel):
            return
        else:
            model = copy.deepcopy(policy.model)
            model.gradient_checkpointing_disable()
        self._own = PackedModel(model.requires_grad_(False).eval().to(policy.model.device))

    @property
    def shares_prompts(self) -> bool:
        return (self._own or self._policy).shares_prompts

    @contextmanager
    def model(self) -> Iterator[PackedModel]:
        """The reference model, for forward passes only."""
        if self._own is not None:
            yield self._own
            return
        with self._policy.model.disable_adapter():
            yield self._policy
