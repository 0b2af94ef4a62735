"""Log-probabilities and entropies of sampled tokens under a model, one pack at a time."""

from __future__ import annotations

from typing import Any

import torch

from grpo_cli.algorithm.packing import Group, Pack, pack_groups
from grpo_cli.policy.model import evaluating

SELF_CHECK_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}
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
        attention_mask=_attention_mask(model, pack),
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


def _attention_mask(model: Any, pack: Pack) -> torch.Tensor:
    """The pack's mask as the model's kernel takes it: eager attention adds it to the scores."""
    mask = pack.attention_mask
    if mask.dim() == 2 or model.config.get_text_config()._attn_implementation != "eager":
        return mask
    hidden = torch.finfo(model.dtype).min
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, hidden)


def _unflatten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(N,) values of the unmasked places, in row order, to (B, T)."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def shares_prompts(model: Any) -> bool:
    """Whether the model computes the same log-probabilities from a shared-prompt pack as from plain rows.

    Asked of its configuration, which names windows and layers that carry state along the row, and of the model
    itself, on a few tokens: a kernel that drops the block mask or the positions gives itself away.
    """
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager") or not _attends_to_all(config):
        return False
    try:
        with evaluating(model), torch.no_grad():  # dropout would tell any two passes apart
            return _passes_self_check(model, config.vocab_size)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False


def _attends_to_all(config: Any) -> bool:
    """Whether every layer is attention over all that the mask shows.

    The block mask carries no window; whether a pack is shorter than it is not known in advance.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    if not {"full_attention", "global"}.issuperset(kinds):
        return False
    return not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def _passes_self_check(model: Any, vocab_size: int) -> bool:
    tokens = torch.randint(vocab_size, (15,), generator=torch.Generator().manual_seed(0)).tolist()
    other = Group(tokens[8:9], [tokens[9:12]], [2])
    groups = [Group(tokens[:3], [tokens[3:6], tokens[6:8]], [0, 1]), other]
    changed = [Group(tokens[:3], [tokens[12:], tokens[6:8]], [0, 1]), other]

    def logprobs(groups: list[Group], shared_prompt: bool) -> torch.Tensor:
        pack = pack_groups(groups, 64, shared_prompt=shared_prompt)[0].to(next(model.parameters()).device)
        return token_logprobs(model, pack, 1.0)[0][pack.samples.argsort()]

    packed = logprobs(groups, True)
    difference = (packed - logprobs(groups, False)).abs().max().item()
    # Where one completion's tokens move another's log-probabilities, however little, something leaks.
    moved = (packed - logprobs(changed, True)).abs()
    leak, effect = moved[1:].max().item(), moved[0].max().item()
    return difference < SELF_CHECK_TOLERANCE[packed_dtype(model)] and leak < 1e-3 * effect


def packed_dtype(model: Any) -> torch.dtype:
    """The precision that a forward pass of `model` runs in, autocast considered."""
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = next(model.parameters()).dtype
    return dtype
