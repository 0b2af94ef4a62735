"""Log-probabilities and entropies of sampled tokens under a model, one pack at a time."""

from __future__ import annotations

from typing import Any

import torch

from grpo_cli.algorithm.packing import Group, Pack, pack_groups

SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest difference in log-probability that rounding may cause between packed and plain rows."""


def token_logprobs(
    model: Any, pack: Pack, temperature: float, *, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each completion token and entropy of the distribution it was drawn from.

    Both are those of softmax(logits / temperature), in float32. Logits exist only for completion tokens.

    Args:
        model: a causal language model of transformers.
        pack: on the model's device.
        temperature: of sampling.
        entropy_gradient: let gradients flow through the entropies.

    Returns:
        Two (B, T) tensors, 0 on padding.
    """
    logits = model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        attention_mask=pack.attention_mask,
        logits_to_keep=pack.predictors,
        use_cache=False,
    ).logits
    logits = logits[0] if pack.predictors.dim() == 1 else logits[pack.mask]  # (N, V)
    scaled = logits.float() / temperature
    log_total = scaled.logsumexp(-1)  # (N,)
    chosen = scaled.gather(1, pack.targets[pack.mask][:, None]).squeeze(1) - log_total
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        probabilities = (scaled - log_total[:, None]).exp()
        entropy = log_total - (probabilities * scaled).sum(-1)
    return _unflatten(chosen, pack.mask), _unflatten(entropy, pack.mask)


def _unflatten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N,) values of the unmasked places, in row order, to (B, T)."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def shares_prompts(model: Any) -> bool:
    """Whether the model computes the same log-probabilities from a shared-prompt pack as from plain rows.

    Asked of the model itself, on a few tokens: a layer that carries state along the row (linear attention, state
    space), a kernel that drops the block mask, or a sliding window shorter than the pack gives itself away.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return False
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        # The block mask carries no window; whether a pack is shorter than it is not known in advance.
        return False
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (12,), generator=generator).tolist()
    groups = [Group(tokens[:3], [tokens[3:6], tokens[6:8]], [0, 1]), Group(tokens[8:9], [tokens[9:]], [2])]
    device = next(model.parameters()).device
    with torch.no_grad():
        try:
            packed, plain = (
                token_logprobs(model, pack_groups(groups, 64, shared_prompt=shared)[0].to(device), 1.0)[0]
                for shared in (True, False)
            )
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
    plain_order = pack_groups(groups, 64, shared_prompt=False)[0].samples
    difference = (packed - plain[plain_order.argsort()]).abs().max().item()
    return difference < SELF_CHECK_TOLERANCE[packed_dtype(model)]


def packed_dtype(model: Any) -> torch.dtype:
    """The precision that a forward pass of `model` runs in, autocast considered."""
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype
