"""Corrects for an engine that samples with other probabilities than the policy that is trained.

An inference engine with its own kernels and precision gives the same weights slightly other log-probabilities, so
training is off-policy before the first update. The importance ratio of policy over sampler makes up for it; bounds
keep single tokens from ruling the step. Pure functions of tensors: no I/O, no model, and what comes out is finite
whatever goes in, so that an engine's odd value can never become a NaN in the weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from grpo_cli.recipe.schema import SamplerCorrectionConfig

LOG_RATIO_LIMIT = 80.0
"""Logs of ratios are held within this of 0: exp(80) is finite in float32, and finite times 0 is 0."""


def sampler_ratio(
    old_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    config: SamplerCorrectionConfig,
) -> torch.Tensor:
    """Bounded importance ratio of policy over sampler, without a gradient.

    With d = old log-prob - sampler's: token modes weigh a token by exp(d), sequence modes a completion by
    exp(sum of d). truncate bounds the weight to [clip_min, clip_max]; mask makes it 0 outside of that (with both
    bounds, on tokens: IcePop, arXiv:2510.18855). Where the sampler's log-prob is not known, d is 0.

    Args:
        old_logprobs: (B, T) under the policy before the step's first update.
        sampling_logprobs: (B, T) under what sampled the tokens; NaN where it did not say.
        mask: (B, T), 1 on tokens that are trained on.
        config: the recipe's `loss.sampler_correction`.

    Returns:
        (B, T), or (B, 1) in the sequence modes; exactly 1 where nothing is known, on padding too.
    """
    difference, known = _log_difference(old_logprobs, sampling_logprobs, mask)
    if config.mode.startswith("sequence"):
        difference, known = difference.sum(-1, keepdim=True), known.any(-1, keepdim=True)
    ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    low = 0.0 if config.clip_min is None else config.clip_min
    high = math.inf if config.clip_max is None else config.clip_max
    if config.mode.endswith("truncate"):
        ratio = ratio.clamp(low, high)
    else:
        ratio = ratio * ((low <= ratio) & (ratio <= high))
    return torch.where(known, ratio, 1.0)


def sampler_metrics(
    old_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    ratio: torch.Tensor | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """How far sampler and policy are apart, under TRL's names.

    `sampling/sampling_logp_difference`: mean and max of |d| over unmasked tokens whose d is known.
    `sampling/importance_sampling_ratio`: min, mean and max of the bounded ratio over unmasked tokens, or over
    completions with one. What has nothing to be taken over is left out.

    Args:
        old_logprobs, sampling_logprobs, mask: as for `sampler_ratio`.
        ratio: (B, T) or (B, 1) from `sampler_ratio`; None if there is no correction.

    Returns:
        The metrics, and for each mean the number of tokens or completions behind it.
    """
    difference, known = _log_difference(old_logprobs, sampling_logprobs, mask)
    metrics, weights = {}, {}
    values = difference[known].abs()
    if values.numel():
        name = "sampling/sampling_logp_difference"
        metrics = {f"{name}/mean": values.mean().item(), f"{name}/max": values.max().item()}
        weights[f"{name}/mean"] = float(values.numel())
    if ratio is not None and mask.any():
        name = "sampling/importance_sampling_ratio"
        per_token = ratio.shape == mask.shape
        values = ratio[mask.bool() if per_token else mask.bool().any(-1, keepdim=True)]
        metrics[f"{name}/min"], metrics[f"{name}/max"] = values.min().item(), values.max().item()
        metrics[f"{name}/mean"], weights[f"{name}/mean"] = values.mean().item(), float(values.numel())
    return metrics, weights


def _log_difference(
    old_logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log(policy / sampler), 0 where it is not known: (B, T), and where it is known: (B, T) bool."""
    difference = old_logprobs.detach() - sampling_logprobs
    known = mask.bool() & ~difference.isnan()
    return torch.where(known, difference, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), known
