"""The loss types, a row each: the recipe's checks, the reference page and the arithmetic follow from this table.

A new loss type is a row here and, if it bounds the ratio in a way of its own, a function in
`algorithm/surrogates.py`. This module imports no torch.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import PydanticKnownError


@dataclass(frozen=True)
class LossType:
    surrogate: Literal["clipped", "cispo", "sapo", "vespo"]
    """How the ratio is bounded: the entry of `SURROGATES` in `algorithm/surrogates.py`."""
    average: Literal["completion_means", "completions", "tokens", "longest_completions"]
    """What token losses are averaged over: completions, where each completion's tokens weigh 1 together;
    completions; tokens; completions of the greatest length that there could have been."""
    reads: tuple[str, ...]
    """Keys of the recipe's `loss` section that not every type reads."""
    epsilon_high: float | None = None
    """Default of that key, where it is not `epsilon`."""
    weighs_completions: bool = False
    """Whether the surrogate weighs completions as a whole. It then has no use for `importance_level`, and takes
    the weights of `sampler_correction` into its own."""


CLIPPING = ("epsilon", "epsilon_high", "delta")
SAPO = ("sapo_temperature_pos", "sapo_temperature_neg")
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")

LOSS_TYPES: dict[str, LossType] = {
    "grpo": LossType("clipped", "completion_means", CLIPPING),
    "bnpo": LossType("clipped", "tokens", CLIPPING),
    "dr_grpo": LossType("clipped", "longest_completions", CLIPPING),
    "dapo": LossType("clipped", "tokens", CLIPPING),
    "luspo": LossType("clipped", "completions", CLIPPING),
    "cispo": LossType("cispo", "tokens", ("epsilon_high",), epsilon_high=5.0),
    "sapo": LossType("sapo", "completion_means", SAPO),
    "vespo": LossType("vespo", "tokens", VESPO, weighs_completions=True),
}


def types_reading(key: str) -> list[str]:
    """The loss types that read a key, or none if all do."""
    return [name for name, row in LOSS_TYPES.items() if key in row.reads]


def known_type(value: Any) -> Any:
    """Return `value` if it names a loss type or may be the path of a user's own function.

    Raises:
        PydanticKnownError: it is neither.
    """
    if isinstance(value, str) and (value in LOSS_TYPES or ":" in value):
        return value
    close = difflib.get_close_matches(str(value).lower().replace("-", "_"), LOSS_TYPES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    choices = ", ".join(map(repr, LOSS_TYPES))
    raise PydanticKnownError("literal_error", {"expected": f"{choices}, or module:function of your own{hint}"})
