"""The policy losses of GRPO and its descendants. Pure functions of tensors: no I/O, no state, no model.

Every loss here is a sum over tokens divided by a normaliser that the caller adds up over the micro-batches and
ranks of an optimizer step, so the loss and gradient of a step do not depend on how it was split.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ParamSpec

import torch

from grpo_cli.algorithm.kl import token_kl
from grpo_cli.algorithm.sampler_correction import sampler_metrics
from grpo_cli.algorithm.surrogates import SURROGATES, SurrogateInputs
from grpo_cli.algorithm.transfer import to_host

if TYPE_CHECKING:
    from grpo_cli.recipe.schema import LossConfig

Parameters = ParamSpec("Parameters")

ENTROPY_SLACK = 1e-5
"""Nats by which the entropies of the same token may differ between two forward passes."""


@dataclass(frozen=True)
class LossOutput:
    loss: torch.Tensor
    """Scalar, already divided by the step's normaliser: add up over micro-batches."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Means over this micro-batch's tokens or completions, or extremes (names ending in min, max)."""
    weights: dict[str, float] = field(default_factory=dict)
    """For each mean, the number of tokens or completions behind it: its weight over micro-batches."""


@dataclass(frozen=True)
class Measured:
    """What the metrics of a micro-batch are taken from: they are computed when they are read, since that waits for
    the device."""

    indicators: dict[str, torch.Tensor]
    """Metric name to (B, T) or (B, 1) values that are averaged."""
    mask: torch.Tensor  # (B, T)
    sampler: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None
    """Log-probabilities of the old policy and of the sampler, and the importance ratio."""

    def on_host(self) -> Measured:
        """The same on the CPU, to be read after `transfer.wait`."""
        sampler = None
        if self.sampler is not None:
            old, sampled, ratio = self.sampler
            sampler = to_host(old), to_host(sampled), None if ratio is None else to_host(ratio)
        indicators = {name: to_host(values) for name, values in self.indicators.items()}
        return Measured(indicators, to_host(self.mask), sampler)

    def summary(self) -> tuple[dict[str, float], dict[str, float]]:
        """The metrics, and the weights of those that are means; see `LossOutput`."""
        metrics, weights = _summarise(self.indicators, self.mask)
        if self.sampler is not None:
            old, sampled, ratio = self.sampler
            of_sampler = sampler_metrics(old, sampled, self.mask, ratio)
            metrics, weights = metrics | of_sampler[0], weights | of_sampler[1]
        return metrics, weights


@dataclass(frozen=True)
class MeasuredLoss:
    """A loss whose metrics nobody has waited for yet."""

    loss: torch.Tensor
    """Scalar, already divided by the step's normaliser: add up over micro-batches."""
    measured: Measured


def measured_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: LossConfig,
    *,
    normalizer: float,
    ref_logprobs: torch.Tensor | None = None,
    sampling_logprobs: torch.Tensor | None = None,
    entropies: torch.Tensor | None = None,
    importance_ratio: torch.Tensor | None = None,
    entropy_threshold: float | torch.Tensor | None = None,
    completion_tokens: torch.Tensor | None = None,
) -> MeasuredLoss:
    """Loss of one micro-batch.

    Args:
        logprobs: (B, T) of the sampled tokens under the policy; the gradient flows into it.
        old_logprobs: (B, T) under the policy before the step's first update.
        advantages: (B,) or (B, T).
        mask: (B, T), 1 on tokens that are trained on, 0 on padding and masked completions.
        config: the recipe's `loss` section.
        normalizer: sum of `loss_normalizer` over the micro-batches and ranks of the optimizer step.
        ref_logprobs: (B, T) under the reference; needed when `beta` is above 0.
        sampling_logprobs: (B, T) under what sampled the tokens, NaN where not known; `old_logprobs` if not given.
        entropies: (B, T) of the policy's distributions; needed for `entropy_coef`, `top_entropy_quantile`.
        importance_ratio: (B, T) or (B, 1) from `sampler_ratio`, 1 on padding; multiplies the policy term.
        entropy_threshold: least entropy of a token that is trained on, from `high_entropy_threshold` over the
            whole optimizer step; taken from this micro-batch if not given.
        completion_tokens: (B,) unmasked tokens of the completion that a row is of; the row's own if not given.

    Returns:
        MeasuredLoss, for which no device is waited for.
    """
    mask = mask.to(logprobs.dtype)
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages  # (B, 1) or (B, T)
    log_ratio = logprobs - old_logprobs
    ratio = importance_ratio_of_level(log_ratio, mask, config)  # (B, T) or (B, 1)

    inputs = SurrogateInputs(logprobs, log_ratio, ratio, advantages, mask, importance_ratio)
    surrogate = SURROGATES[config.row.surrogate](inputs, config)
    token_loss = surrogate.token_loss
    if config.off_policy_threshold is not None:
        sampler = old_logprobs if sampling_logprobs is None else sampling_logprobs
        token_loss = token_loss * on_policy_mask(logprobs, sampler, advantages, mask, config.off_policy_threshold)
    if importance_ratio is not None and not config.row.weighs_completions:
        token_loss = token_loss * importance_ratio

    indicators = dict(surrogate.indicators)
    if entropies is not None:
        indicators["entropy"] = entropies.detach()
        token_loss = token_loss - config.entropy_coef * entropies if config.entropy_coef else token_loss
    if config.top_entropy_quantile < 1:
        assert entropies is not None, "top_entropy_quantile needs entropies"
        if entropy_threshold is None:
            entropy_threshold = high_entropy_threshold(entropies, mask, config.top_entropy_quantile)
        token_loss = token_loss * (entropies >= entropy_threshold)
    if config.beta:
        assert ref_logprobs is not None, "beta above 0 needs ref_logprobs"
        kl = token_kl(logprobs, ref_logprobs, config.kl_estimator)
        kl = kl * ratio if config.bias_corrected_kl else kl
        indicators["kl"] = kl.detach()
        token_loss = token_loss + config.beta * kl

    loss = _weighted_token_sum(token_loss, mask, config, completion_tokens) / max(normalizer, 1.0)
    compared = None if sampling_logprobs is None else (old_logprobs, sampling_logprobs, importance_ratio)
    return MeasuredLoss(loss, Measured(indicators, mask, compared))


def _with_numbers(loss: Callable[Parameters, MeasuredLoss]) -> Callable[Parameters, LossOutput]:
    """The same loss with metrics that are numbers."""

    def policy_loss(*inputs: Parameters.args, **named: Parameters.kwargs) -> LossOutput:
        """As `measured_loss`, with metrics that are numbers, so a device is waited for."""
        output = loss(*inputs, **named)
        return LossOutput(output.loss, *output.measured.summary())

    signature = inspect.signature(loss).replace(return_annotation="LossOutput")
    policy_loss.__signature__ = signature  # type: ignore[attr-defined]
    return policy_loss


policy_loss = _with_numbers(measured_loss)


def loss_normalizer(
    mask: torch.Tensor, config: LossConfig, max_completion_tokens: int, num_completions: int | None = None
) -> float:
    """What a micro-batch adds to the denominator of its optimizer step.

    What that is stands in the type's row of `LOSS_TYPES`; for a user's own function it is the number of tokens.

    Args:
        mask: (B, T), 1 on tokens that are trained on.
        config: the recipe's `loss` section.
        max_completion_tokens: length of the longest completion that there could have been.
        num_completions: that the B rows are of; B if not given.
    """
    average = "tokens" if config.is_function else config.row.average
    if average == "tokens":
        return float(mask.sum())
    count = mask.shape[0] if num_completions is None else num_completions
    return float(count * (max_completion_tokens if average == "longest_completions" else 1))


def groups_to_forward(
    advantages: torch.Tensor, trained: torch.Tensor, num_generations: int, config: LossConfig
) -> torch.Tensor:
    """Which groups of a step have a gradient: (P,) bool.

    The policy term is a multiple of the advantage, so a group whose advantages are all 0 adds nothing to it. The
    KL and the entropy bonus have a gradient on every token that is trained on, and the entropy quantile is taken
    over all of them; what a user's own function does with a token is not known. What is left out stays in the
    normaliser: the loss is the same.

    Args:
        advantages: (N,) of each completion.
        trained: (N,) bool, False for completions that are masked whole.
        num_generations: G, completions per group.
        config: the recipe's `loss` section.
    """
    has_other_terms = config.beta > 0 or config.entropy_coef > 0 or config.top_entropy_quantile < 1
    needs_every_token = has_other_terms or config.is_function
    matters = trained & ((advantages != 0) | needs_every_token)
    return matters.view(-1, num_generations).any(1)


def importance_ratio_of_level(log_ratio: torch.Tensor, mask: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Policy over old policy: (B, T) per token, or (B, 1) the geometric mean of a row (GSPO, arXiv:2507.18071 eq.
    7), which is a completion, or one turn of it where the chat template writes the history anew."""
    if config.importance_level == "sequence":
        mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        return mean.exp()
    return log_ratio.exp()


def on_policy_mask(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """Off-policy sequence masking (DeepSeek-V3.2): 0 for a row with a negative advantage whose mean
    log(sampler / policy) exceeds `threshold`, else 1; (B, 1) or (B, T) as the advantages. NaN counts as 0."""
    drift = (sampling_logprobs - logprobs.detach()).nan_to_num(nan=0.0)
    mean_drift = (drift * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return ((advantages >= 0) | (mean_drift <= threshold)).to(mask.dtype)


def high_entropy_threshold(entropies: torch.Tensor, mask: torch.Tensor, quantile: float) -> torch.Tensor:
    """Entropy that the top `quantile` of the unmasked tokens reach ("80/20", arXiv:2506.01939); inf if none.

    Lowered by ENTROPY_SLACK, so that rounding does not decide about the token that sits on the quantile.

    Returns:
        () in float64.
    """
    return masked_quantile(entropies.detach().float(), mask.bool(), 1 - quantile).double() - ENTROPY_SLACK


def masked_quantile(values: torch.Tensor, mask: torch.Tensor, quantile: float) -> torch.Tensor:
    """What `torch.quantile` gives for the unmasked values, which it refuses to do for more than 2^24 of them.

    Interpolated between the two nearest, its place in the order rounded to the values' precision as there. NaN if
    one of them is, inf if there is none. Waits for no device.

    Args:
        values: of any shape.
        mask: bool, of the same shape.
        quantile: between 0 and 1.

    Returns:
        ()
    """
    if values.numel() == 0:
        return values.new_full((), math.inf)
    ordered = torch.where(mask, values, math.inf).flatten().sort().values
    count = mask.sum()
    last = (count - 1).clamp(min=0)
    place = last.to(values.dtype) * quantile
    below, above = place.floor().long(), place.ceil().long()
    lower, upper = (ordered.take(end.minimum(last)) for end in (below, above))
    found = lower.lerp(upper, place - below)
    found = torch.where((mask & values.isnan()).any(), math.nan, found)
    return torch.where(count > 0, found, math.inf)


def _weighted_token_sum(
    token_loss: torch.Tensor, mask: torch.Tensor, config: LossConfig, completion_tokens: torch.Tensor | None
) -> torch.Tensor:
    """Sum over unmasked tokens, each completion's weighing 1 together where the average is over their means."""
    masked = token_loss * mask  # (B, T); a (B, 1) loss spreads over its completion here
    if config.row.average == "completion_means":
        lengths = mask.sum(-1) if completion_tokens is None else completion_tokens  # (B,)
        return (masked.sum(-1) / lengths.clamp(min=1)).sum()
    return masked.sum()


def _summarise(
    indicators: dict[str, torch.Tensor], mask: torch.Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Means of the indicators, the extremes over completions of the clip ratios, and the means' weights."""
    metrics: dict[str, float] = {}
    weights: dict[str, float] = {}
    lengths = mask.sum(-1)  # (B,)
    for name, values in indicators.items():
        if values.shape[1] == 1 and mask.shape[1] != 1:
            total, count, per_completion = values.sum(), float(values.shape[0]), values.squeeze(1)
        else:
            total, count = (values * mask).sum(), float(lengths.sum())
            per_completion = ((values * mask).sum(-1) / lengths)[lengths > 0]
        metrics[name] = float(total) / max(count, 1.0)
        weights[name] = count
        if name == "clip_ratio/low_mean" and per_completion.numel():
            metrics["clip_ratio/low_min"] = float(per_completion.min())
        if name == "clip_ratio/high_mean" and per_completion.numel():
            metrics["clip_ratio/high_max"] = float(per_completion.max())
    return metrics, weights
