"""What training made of single tokens: from a stored completion, without a model and without torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from grpo_cli.record.completions import StoredCompletion

if TYPE_CHECKING:
    from grpo_cli.recipe.schema import LossConfig

LARGEST_LOG_RATIO = 80.0
"""The log of a ratio is held within this of 0: exp(80) is a number."""


def token_ratios(completion: StoredCompletion) -> list[float | None]:
    """ρ_t = π_θ / π_sampler of each token when it was trained on last; None where one of them is not known."""
    return [
        None if policy is None or sampler is None else _exp(policy - sampler)
        for policy, sampler in zip(completion.policy_logprobs, completion.logprobs, strict=True)
    ]


def token_losses(completion: StoredCompletion, config: LossConfig) -> list[float | None]:
    """What the policy term of the loss says of each token, before tokens are averaged: of the clipped types
    -min(min(ρ_t, delta) A, clip(ρ_t, 1-ε, 1+ε_high) A).

    The ratio is to the sampler, which stands for the policy before the step's first update: the same but for
    rounding where the run's own engine samples. KL, entropy and weights of `sampler_correction` are left out.

    Args:
        completion: with its advantage A.
        config: the recipe's `loss` section.

    Returns:
        None where a ratio is not known; None of all tokens where the loss is a user's own function, or weighs
        completions as a whole.
    """
    ratios = token_ratios(completion)
    surrogate = None if config.is_function else SURROGATES.get(config.row.surrogate)
    if surrogate is None:
        return [None] * len(ratios)
    if config.importance_level == "sequence":
        ratios = _of_sequence(ratios)
    return [
        None if ratio is None or logprob is None else surrogate(ratio, logprob, completion.advantage, config)
        for ratio, logprob in zip(ratios, completion.policy_logprobs, strict=True)
    ]


def _clipped(ratio: float, logprob: float, advantage: float, config: LossConfig) -> float:
    bounded = ratio if config.delta is None else min(ratio, config.delta)
    clipped = min(max(ratio, 1 - config.epsilon), 1 + config.clip_high)
    return -min(bounded * advantage, clipped * advantage)


def _cispo(ratio: float, logprob: float, advantage: float, config: LossConfig) -> float:
    return -min(ratio, config.clip_high) * advantage * logprob


def _sapo(ratio: float, logprob: float, advantage: float, config: LossConfig) -> float:
    tau = config.sapo_temperature_pos if advantage > 0 else config.sapo_temperature_neg
    return -4 / tau / (1 + _exp(-tau * (ratio - 1))) * advantage


SURROGATES: dict[str, Callable[[float, float, float, LossConfig], float]] = {
    "clipped": _clipped,
    "cispo": _cispo,
    "sapo": _sapo,
}
"""Those of `algorithm/surrogates.py` that say something of a token by itself, called with its ratio, its
log-probability under the policy, and its advantage."""


def _of_sequence(ratios: list[float | None]) -> list[float | None]:
    """The geometric mean of the known ratios in the place of each."""
    logs = [math.log(ratio) for ratio in ratios if ratio is not None]
    mean = _exp(sum(logs) / max(len(logs), 1))
    return [None if ratio is None else mean for ratio in ratios]


def _exp(value: float) -> float:
    return math.exp(min(max(value, -LARGEST_LOG_RATIO), LARGEST_LOG_RATIO))
