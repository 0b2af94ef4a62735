"""How each family of losses bounds the ratio of policy to old policy. Pure functions of tensors.

`recipe/loss_types.py` says which loss type uses which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from grpo_cli.recipe.schema import LossConfig

LOG_WEIGHT_MIN = math.log(1e-8)
LOG_WEIGHT_MAX = 20.0
"""VESPO clamps the log of a completion's importance weight to this range."""


@dataclass(frozen=True)
class SurrogateInputs:
    """What a policy term is made of."""

    logprobs: torch.Tensor  # (B, T); the gradient flows into it
    log_ratio: torch.Tensor  # (B, T), policy over old policy
    ratio: torch.Tensor  # (B, T), or (B, 1) with importance_level: sequence
    advantages: torch.Tensor  # (B, 1) or (B, T)
    mask: torch.Tensor  # (B, T)
    importance_ratio: torch.Tensor | None  # (B, T) or (B, 1), old policy over sampler


@dataclass(frozen=True)
class Surrogate:
    """The policy term before masks and averaging."""

    token_loss: torch.Tensor
    """(B, T), or (B, 1) where it is the same for a whole completion."""
    indicators: dict[str, torch.Tensor]
    """Metric name to (B, T) or (B, 1) values that are averaged."""


def _clipped(inputs: SurrogateInputs, config: LossConfig) -> Surrogate:
    """-min(min(ratio, delta)·A, clip(ratio, 1-eps, 1+eps_high)·A) (PPO, arXiv:1707.06347 eq. 7)."""
    ratio, advantages = inputs.ratio, inputs.advantages
    low, high = 1 - config.epsilon, 1 + config.clip_high
    bounded = ratio if config.delta is None else ratio.clamp(max=config.delta)
    token_loss = -torch.min(bounded * advantages, ratio.clamp(low, high) * advantages)
    clipped_low = (bounded < low) & (advantages < 0)
    clipped_high = (bounded > high) & (advantages > 0)
    indicators = {
        "clip_ratio/low_mean": clipped_low,
        "clip_ratio/high_mean": clipped_high,
        "clip_ratio/region_mean": clipped_low | clipped_high,
    }
    return Surrogate(token_loss, {name: value.to(ratio.dtype) for name, value in indicators.items()})


def _cispo(inputs: SurrogateInputs, config: LossConfig) -> Surrogate:
    """-sg(min(ratio, eps_high))·A·log pi: the weight is clipped, the gradient never is (arXiv:2506.13585)."""
    ratio, advantages = inputs.ratio, inputs.advantages
    token_loss = -ratio.clamp(max=config.clip_high).detach() * advantages * inputs.logprobs
    clipped = (ratio > config.clip_high) & (advantages > 0)
    return Surrogate(token_loss, {"cispo_clip_ratio": clipped.to(ratio.dtype)})


def _sapo(inputs: SurrogateInputs, config: LossConfig) -> Surrogate:
    """-4/tau·sigmoid(tau·(ratio - 1))·A: a soft gate in place of the clip (SAPO, arXiv:2511.20347)."""
    advantages = inputs.advantages
    tau = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    return Surrogate(-torch.sigmoid(tau * (inputs.ratio - 1)) * 4 / tau * advantages, {})


def _vespo(inputs: SurrogateInputs, config: LossConfig) -> Surrogate:
    """-phi(w)·A·log pi with phi(w) = w^k·exp(lambda·(1 - w)), w the importance weight of the whole completion
    (VESPO, arXiv:2602.10693)."""
    log_ratio, advantages = inputs.log_ratio.detach(), inputs.advantages
    log_weight = (log_ratio.clamp(-LOG_WEIGHT_MAX, LOG_WEIGHT_MAX) * inputs.mask).sum(-1, keepdim=True)
    if inputs.importance_ratio is not None:
        log_sampler_ratio = inputs.importance_ratio.log().clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX)
        log_weight = log_weight + log_sampler_ratio.sum(-1, keepdim=True)
    log_weight = log_weight.clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX)  # (B, 1)
    k = torch.where(advantages >= 0, config.vespo_k_pos, config.vespo_k_neg)
    decay = torch.where(advantages >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg)
    phi = (decay + k * log_weight - decay * log_weight.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)
    return Surrogate(-phi * advantages * inputs.logprobs, {"vespo/phi_seq_mean": phi})


SURROGATES: dict[str, Callable[[SurrogateInputs, LossConfig], Surrogate]] = {
    "clipped": _clipped,
    "cispo": _cispo,
    "sapo": _sapo,
    "vespo": _vespo,
}
