"""Advantages: how much better a completion is than the others of its group. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

STD_FLOOR = 1e-4
"""Added to a standard deviation before dividing by it, as in the reference implementation of GRPO."""


def compute_advantages(
    rewards: torch.Tensor,
    weights: Sequence[float] | torch.Tensor,
    num_generations: int,
    scale_rewards: Literal["group", "batch", "none"],
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"],
) -> torch.Tensor:
    """Group-relative advantages of a whole step.

    `sum_then_normalize` (GRPO, arXiv:2402.03300 eq. 3): with r the weighted sum of a completion's rewards,
    A = (r - mean_group(r)) / (std(r) + 1e-4), std (ddof 1) over the group or the step, or no division.
    `normalize_then_sum` (GDPO, arXiv:2601.05242): each function is normalised within its group, the weighted
    sum of those is normalised over the step.

    Args:
        rewards: (N, K) one column per function; NaN where the function did not apply. The completions of a
            group are neighbours.
        weights: (K,) factor of each function.
        num_generations: G, completions per group; divides N.

    Returns:
        (N,) float32. A completion without any reward gets 0 and does not move its group's baseline.
    """
    rewards = rewards.double()
    scored = ~rewards.isnan().all(dim=1)  # (N,)
    if aggregation == "normalize_then_sum":
        groups = rewards.reshape(-1, num_generations, rewards.shape[1])  # (P, G, K)
        normalised = (centred(groups, dim=1) / (nan_std(groups, dim=1) + STD_FLOOR)).reshape(rewards.shape)
        total = weighted_sum(normalised, weights)  # (N,)
        advantages = centred(total, dim=0) / (nan_std(total, dim=0) + STD_FLOOR)
    else:
        total = weighted_sum(rewards, weights)
        groups = total.view(-1, num_generations)  # (P, G)
        advantages = centred(groups, dim=1)
        if scale_rewards == "group":
            advantages = advantages / (nan_std(groups, dim=1) + STD_FLOOR)
        elif scale_rewards == "batch":
            advantages = advantages / (nan_std(total, dim=0) + STD_FLOOR)
        advantages = advantages.reshape(-1)
    return torch.where(scored, advantages, 0.0).float()


def flat_groups(
    rewards: torch.Tensor, weights: Sequence[float] | torch.Tensor, num_generations: int
) -> torch.Tensor:
    """Which groups have no spread in their weighted rewards, as those without any reward: (N, K) to (P,) bool."""
    spread = nan_std(weighted_sum(rewards, weights).view(-1, num_generations), dim=1).squeeze(1)
    return torch.isclose(spread, torch.zeros_like(spread))


def weighted_sum(rewards: torch.Tensor, weights: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """(N, K) rewards to (N,): NaN entries are left out, a row of nothing but NaN stays NaN."""
    factors = torch.as_tensor(weights, dtype=rewards.dtype, device=rewards.device)
    total = (rewards * factors).nansum(dim=1)
    return torch.where(rewards.isnan().all(dim=1), torch.nan, total)


def centred(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Values minus their NaN-ignoring mean along `dim`; exactly 0 where all are equal, whatever the rounding."""
    low = values.nan_to_num(nan=torch.inf).amin(dim, keepdim=True)
    high = values.nan_to_num(nan=-torch.inf).amax(dim, keepdim=True)
    return torch.where(low == high, values - values, values - values.nanmean(dim, keepdim=True))


def nan_std(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sample standard deviation (ddof 1) along `dim`, kept as a dimension of 1; fewer than two values give 0.

    Finite also where the squares of the values are not.
    """
    present = ~values.isnan()
    count = present.sum(dim, keepdim=True)
    deviations = torch.where(present, values - values.nanmean(dim, keepdim=True), 0.0)

    def root_mean_square(values: torch.Tensor) -> torch.Tensor:
        return ((values**2).sum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()

    std, largest = root_mean_square(deviations), deviations.abs().amax(dim, keepdim=True)
    return torch.where(std.isinf(), largest * root_mean_square(deviations / largest), std)
