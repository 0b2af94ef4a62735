"""Estimators of the KL divergence from single samples (Schulman, "Approximating KL Divergence", 2020)."""

from __future__ import annotations

from typing import Literal

import torch


def token_kl(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: Literal["k1", "k2", "k3"] = "k3"
) -> torch.Tensor:
    """KL(policy || reference) of each sampled token, estimated from its two log-probabilities.

    With d = ref - policy: k1 = -d; k2 = d²/2; k3 = exp(d) - d - 1.

    Args:
        logprobs: (B, T) under the policy; the gradient flows into it.
        ref_logprobs: (B, T) under the reference.

    Returns:
        (B, T)
    """
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.exp() - difference - 1
