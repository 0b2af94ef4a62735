"""How a token is drawn and where a completion ends, for recipe, engines and servers alike. No torch import.

`serve/sampling.py` gives these settings to vLLM, `rollout/embedded/sampling.py` applies them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from grpo_cli.recipe.section import Section

FILTERS = ("top_p", "top_k", "min_p", "repetition_penalty")
"""Settings that change the distribution, unless they have their default."""


class Sampling(Section):
    max_completion_tokens: int = Field(default=512, ge=1)
    """Longest completion in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it, in sampling and in training."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens whose probability reaches it."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the `top_k` most likely tokens; 0 is all."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Leave out tokens less likely than `min_p` times the likeliest."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens of the prompt and the completion so far become less likely."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a completion; the text handed to rewards ends before them."""

    @property
    def filters(self) -> list[str]:
        """The settings by which tokens are drawn from another distribution than softmax(logits / temperature)."""
        fields = type(self).model_fields
        return [name for name in FILTERS if getattr(self, name) != fields[name].default]

    @property
    def is_filtered(self) -> bool:
        """Whether there are any `filters`."""
        return bool(self.filters)
