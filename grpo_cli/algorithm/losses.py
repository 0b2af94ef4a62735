"""The policy losses of GRPO and its descendants. Pure functions of tensors: no I/O, no state, no model.

Every loss here is a sum over tokens divided by a normaliser that the caller adds up over the micro-batches and
ranks of an optimizer step, so the loss and gradient of a step do not depend on how it was split.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from grpo_cli.algorithm.kl import token_kl
from grpo_cli.algorithm.sampler_correction import sampler_metrics
from grpo_cli.algorithm.transfer import to_host

if TYPE_CHECKING:
    from grpo_cli.recipe.schema import LossConfig

LOG_WEIGHT_MIN = math.log(1e-8)
LOG_WEIGHT_MAX = 20.0
"""VESPO clamps the log of a completion's importance weight to this range."""

ENTROPY_SLACK = 1e-5
"""Nats by which the entropies of the same token may differ between two forward passes."""


@dataclass(frozen=True)
class LossOutput:
    loss: torch.Tensor
    """Scalar, already divided by the step's normaliser: add up over micro-batches."""
    metrics: dict[str, float]
    """Means over this micro-batch's tokens or completions, or extremes (names ending in min, max)."""
    weights: dict[str, float]
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


@dataclass(frozen=True)
class Surrogate:
    """The policy term before masks and averaging."""

    token_loss: torch.Tensor
    """(B, T), or (B, 1) where it is the same for a whole completion."""
    indicators: dict[str, torch.Tensor]
    """Metric name to (B, T) or (B, 1) values that are averaged."""


def policy_loss(
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
) -> LossOutput:
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

    Returns:
        LossOutput. Its metrics are numbers, so a device is waited for.
    """
    output = measured_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        config,
        normalizer=normalizer,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
        entropies=entropies,
        importance_ratio=importance_ratio,
        entropy_threshold=entropy_threshold,
    )
    return LossOutput(output.loss, *output.measured.summary())


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
) -> MeasuredLoss:
    """As `policy_loss`, without waiting for a device."""
    mask = mask.to(logprobs.dtype)
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages  # (B, 1) or (B, T)
    log_ratio = logprobs - old_logprobs
    ratio = importance_ratio_of_level(log_ratio, mask, config)  # (B, T) or (B, 1)

    if config.type == "vespo":
        surrogate = _vespo(logprobs, log_ratio, advantages, mask, importance_ratio, config)
    else:
        surrogate = SURROGATES[config.type](logprobs, ratio, advantages, config)
    token_loss = surrogate.token_loss
    if config.off_policy_threshold is not None:
        sampler = old_logprobs if sampling_logprobs is None else sampling_logprobs
        token_loss = token_loss * on_policy_mask(logprobs, sampler, advantages, mask, config.off_policy_threshold)
    if importance_ratio is not None and config.type != "vespo":
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

    loss = _weighted_token_sum(token_loss, mask, config) / max(normalizer, 1.0)
    compared = None if sampling_logprobs is None else (old_logprobs, sampling_logprobs, importance_ratio)
    return MeasuredLoss(loss, Measured(indicators, mask, compared))


def loss_normalizer(mask: torch.Tensor, config: LossConfig, max_completion_tokens: int) -> float:
    """What a micro-batch adds to the denominator of its optimizer step.

    grpo, sapo and luspo average over completions; bnpo, dapo, cispo and vespo over tokens; dr_grpo divides by
    the longest completion that could have been (arXiv:2503.20783).

    Args:
        mask: (B, T), 1 on tokens that are trained on.
    """
    if config.type in ("grpo", "sapo", "luspo"):
        return float(mask.shape[0])
    if config.type == "dr_grpo":
        return float(mask.shape[0] * max_completion_tokens)
    return float(mask.sum())


def groups_to_forward(
    advantages: torch.Tensor, trained: torch.Tensor, num_generations: int, config: LossConfig
) -> torch.Tensor:
    """Which groups of a step have a gradient: (P,) bool.

    The policy term is a multiple of the advantage, so a group whose advantages are all 0 adds nothing to it. The
    KL and the entropy bonus have a gradient on every token that is trained on, and the entropy quantile is taken
    over all of them. What is left out stays in the normaliser: the loss is the same.

    Args:
        advantages: (N,) of each completion.
        trained: (N,) bool, False for completions that are masked whole.
        num_generations: G, completions per group.
        config: the recipe's `loss` section.
    """
    needs_every_token = config.beta > 0 or config.entropy_coef > 0 or config.top_entropy_quantile < 1
    matters = trained & ((advantages != 0) | needs_every_token)
    return matters.view(-1, num_generations).any(1)


def importance_ratio_of_level(log_ratio: torch.Tensor, mask: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Policy over old policy: (B, T) per token, or (B, 1) the geometric mean of a completion (GSPO,
    arXiv:2507.18071 eq. 7)."""
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
    """Off-policy sequence masking (DeepSeek-V3.2): 0 for a completion with a negative advantage whose mean
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


def _clipped(
    logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, config: LossConfig
) -> Surrogate:
    """-min(min(ratio, delta)·A, clip(ratio, 1-eps, 1+eps_high)·A) (PPO, arXiv:1707.06347 eq. 7)."""
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


def _cispo(logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, config: LossConfig) -> Surrogate:
    """-sg(min(ratio, eps_high))·A·log pi: the weight is clipped, the gradient never is (arXiv:2506.13585)."""
    token_loss = -ratio.clamp(max=config.clip_high).detach() * advantages * logprobs
    clipped = (ratio > config.clip_high) & (advantages > 0)
    return Surrogate(token_loss, {"cispo_clip_ratio": clipped.to(ratio.dtype)})


def _sapo(logprobs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, config: LossConfig) -> Surrogate:
    """-4/tau·sigmoid(tau·(ratio - 1))·A: a soft gate in place of the clip (SAPO, arXiv:2511.20347)."""
    tau = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    return Surrogate(-torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages, {})


def _vespo(
    logprobs: torch.Tensor,
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    importance_ratio: torch.Tensor | None,
    config: LossConfig,
) -> Surrogate:
    """-phi(w)·A·log pi with phi(w) = w^k·exp(lambda·(1 - w)), w the importance weight of the whole completion
    (VESPO, arXiv:2602.10693)."""
    log_weight = (log_ratio.detach().clamp(-LOG_WEIGHT_MAX, LOG_WEIGHT_MAX) * mask).sum(-1, keepdim=True)
    if importance_ratio is not None:
        log_weight = log_weight + importance_ratio.log().clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX).sum(
            -1, keepdim=True
        )
    log_weight = log_weight.clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX)  # (B, 1)
    k = torch.where(advantages >= 0, config.vespo_k_pos, config.vespo_k_neg)
    decay = torch.where(advantages >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg)
    phi = (decay + k * log_weight - decay * log_weight.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)
    return Surrogate(-phi * advantages * logprobs, {"vespo/phi_seq_mean": phi})


SURROGATES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, LossConfig], Surrogate]] = {
    "grpo": _clipped,
    "bnpo": _clipped,
    "dr_grpo": _clipped,
    "dapo": _clipped,
    "luspo": _clipped,
    "cispo": _cispo,
    "sapo": _sapo,
}


def _weighted_token_sum(token_loss: torch.Tensor, mask: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Sum over unmasked tokens; for grpo and sapo each completion's tokens weigh 1 together."""
    masked = token_loss * mask  # (B, T); a (B, 1) loss spreads over its completion here
    if config.type in ("grpo", "sapo"):
        return (masked.sum(-1) / mask.sum(-1).clamp(min=1)).sum()
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
