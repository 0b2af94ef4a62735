"""Draws tokens from logits. One uniform number decides one token, so a row's tokens depend on no other row."""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_cli.recipe.sampling import Sampling


def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float,
    processors: LogitsProcessorList,
    history: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token for each row by inverting its cumulative distribution.

    Args:
        logits: (R, V).
        uniforms: (R,) in [0, 1), float64.
        temperature: divides the logits.
        processors: applied to the divided logits (penalty, top-k, top-p, min-p).
        history: (R, L) tokens so far, for the penalty.

    Returns:
        (R,) tokens and (R,) their log-probabilities under softmax(logits / temperature), before processing; not
        finite where a row of logits is no distribution: one of them is NaN or inf, or all are -inf.
    """
    scaled = logits.float() / temperature  # (R, V)
    processed = processors(history, scaled) if processors else scaled
    peak = processed.amax(-1, keepdim=True)
    cumulative = (processed - peak).exp_().double().cumsum_(-1)  # (R, V), up to a factor for each row
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True).clamp_(max=logits.shape[1] - 1)
    log_total = scaled.logsumexp(-1, keepdim=True) if processors else peak + total.log().float()
    return tokens.squeeze(1), (scaled.gather(1, tokens) - log_total).squeeze(1)


def logits_processors(sampling: Sampling) -> LogitsProcessorList:
    """The processors that the recipe asks for, in transformers' order."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors
