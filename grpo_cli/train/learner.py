"""The policy and all that moves it: packs, log-probabilities, gradients, optimizer steps.

All ranks call the same methods in the same order.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from grpo_cli.algorithm.losses import LossOutput, MeasuredLoss, high_entropy_threshold, loss_normalizer
from grpo_cli.algorithm.packing import (
    Group,
    Pack,
    deal_groups,
    empty_pack,
    pack_groups,
    plan_minibatches,
)
from grpo_cli.algorithm.transfer import to_host, wait
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import Strategy
from grpo_cli.distributed.strategies.base import GradientNotFinite
from grpo_cli.errors import RunError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.model import evaluating
from grpo_cli.policy.reference import Reference
from grpo_cli.recipe.limits import automatic_microbatch_tokens
from grpo_cli.recipe.schema import Recipe
from grpo_cli.record.metrics import Metrics
from grpo_cli.train.guards import Autocast
from grpo_cli.train.metrics import MetricMeans
from grpo_cli.train.not_finite import BackwardPass, NotFinite
from grpo_cli.train.step_data import OldLogprobs, StepData, share


@dataclass(frozen=True)
class Part:
    """One optimizer step's share of a step."""

    packs: list[Pack]
    """This rank's."""
    normalizer: float
    """What the sum over all tokens of all ranks is divided by."""


@dataclass
class Learner:
    """Trains the policy."""

    recipe: Recipe
    ranks: Ranks
    strategy: Strategy
    model: Any
    tokenizer: Any
    policy: PackedModel
    reference: Reference | None
    autocast: Autocast
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loss: Callable[..., MeasuredLoss | LossOutput]
    """Called as `policy_loss`."""
    _means: MetricMeans = field(default_factory=MetricMeans)
    _means_of_part: MetricMeans = field(default_factory=MetricMeans)
    _forwarded: tuple[torch.Tensor, torch.Tensor] | None = None
    """Samples and log-probabilities of the pack whose backward pass comes next."""
    _passes: list[BackwardPass] = field(default_factory=list)
    _trained: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Samples and log-probabilities of a step's backward passes, on the host, to be read after `wait`."""
    _skipped: int = 0
    _skipped_in_a_row: int = 0

    def parts(self, data: StepData) -> list[Part]:
        """The parts of one pass over a step's groups: an optimizer step each."""
        loss, generation = self.recipe.loss, self.recipe.generation
        groups = data.rollout.groups()
        parts = []
        for places in plan_minibatches(len(data.kept), self.recipe.train.optimizer_steps_per_rollout):
            part = [data.kept[place] for place in places]
            mask, count = data.mask[data.rows_of(part)], len(part) * generation.num_generations
            normalizer = loss_normalizer(mask, loss, generation.max_completion_tokens, count)
            parts.append(Part(self._packs([groups[i] for i in part if data.forwarded[i]]), normalizer))
        return parts

    def _packs(self, groups: Sequence[Group]) -> list[Pack]:
        """This rank's packs of some groups, as the model takes them and the device can hold them.

        Groups stay whole. Where the ranks must run alike, all have as many packs, at least one.
        """
        configured = self.recipe.train.max_tokens_per_microbatch
        longest = max((len(context) for group in groups for context in group.contexts), default=0)
        budget = configured or automatic_microbatch_tokens(self.ranks.device.type, longest)
        own = deal_groups(groups, self.ranks.world_size)[self.ranks.rank]
        packs = pack_groups(own, budget, shared_prompt=self.policy.shares_prompts)
        if self.strategy.runs_alike:
            most = max(1, *self.ranks.gather(len(packs)))
            packs += [empty_pack(shared_prompt=self.policy.shares_prompts)] * (most - len(packs))
        return packs

    def reference_logprobs(self, groups: Sequence[Group], shape: torch.Size) -> torch.Tensor | None:
        """(R, T) log π_ref of these groups' tokens, 0 elsewhere; None without a reference."""
        if self.reference is None:
            return None
        packs = self._packs(groups)
        with self.reference.model() as reference:
            own = self._on_host("logprobs", reference, packs, shape)
        # A group may be another rank's when it is trained on. Each entry is one rank's, and 0 elsewhere.
        return self.ranks.sum(own)

    def score(self, data: StepData, parts: Sequence[Part]) -> OldLogprobs:
        """Compute the old log-probabilities that cannot be had from the packs' own forward passes.

        The first optimizer step trains the policy that sampled, so the log-probabilities that it trains on are
        the old ones. Later packs are scored before the policy moves. An adapter's dropout makes a pass of
        training noisy: later iterations would divide by that noise, so then all packs are scored without it.
        """
        lora = self.recipe.model.lora
        is_noisy = lora is not None and lora.dropout > 0
        first = 0 if is_noisy and self.recipe.train.num_iterations > 1 else 1
        packs = [pack for part in parts[first:] for pack in part.packs]
        scored = self._on_host("logprobs", self.policy, packs, data.mask.shape)
        is_scored = torch.zeros(len(data.mask), dtype=torch.bool)
        for pack in packs:
            is_scored[pack.samples] = True
        return OldLogprobs(scored, is_scored)

    def entropy_threshold(self, part: Part, data: StepData) -> float | None:
        """The entropy that `loss.top_entropy_quantile` of the part's tokens reach, over all packs of all ranks,
        which no pack can know alone; None where each can."""
        quantile = self.recipe.loss.top_entropy_quantile
        if quantile == 1 or (self.ranks.world_size == 1 and len(part.packs) <= 1):
            return None
        entropies = self._on_host("entropies", self.policy, part.packs, data.mask.shape)
        mask = torch.zeros_like(entropies)
        for pack in part.packs:
            mask[pack.samples, : pack.mask.shape[1]] = share(data.mask, pack)
        return high_entropy_threshold(self.ranks.sum(entropies), self.ranks.sum(mask), quantile).item()

    @torch.no_grad()
    def _on_host(
        self,
        what: Literal["logprobs", "entropies"],
        model: PackedModel,
        packs: Sequence[Pack],
        shape: torch.Size,
    ) -> torch.Tensor:
        """(R, T) log-probabilities or entropies of the packs' tokens under `model`, 0 elsewhere."""
        found = []
        with evaluating(model.model):
            for pack in packs:
                with self.autocast():
                    logprobs, entropies = model.token_logprobs(self.to_device(pack), self._temperature)
                found.append(to_host(logprobs if what == "logprobs" else entropies))
        wait()
        return _placed(zip((pack.samples for pack in packs), found, strict=True), shape)

    @property
    def _temperature(self) -> float:
        return self.recipe.generation.temperature

    def to_device(self, pack: Pack) -> Pack:
        return pack.to(self.ranks.device)

    def logprobs(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) log π_θ of the pack's tokens, with a gradient, and (B, T) entropies, which have one if the loss
        rewards entropy."""
        with self.autocast():
            logprobs, entropies = self.policy.token_logprobs(
                pack, self._temperature, entropy_gradient=self.recipe.loss.entropy_coef > 0
            )
        self._forwarded = pack.samples, logprobs
        return logprobs, entropies

    def zero_grad(self) -> None:
        self.strategy.zero_grad()

    def backward(self, output: LossOutput | MeasuredLoss) -> None:
        """Add the gradient of one pack's share of the loss.

        Where the loss or a log-probability is not finite, the gradient is made NaN, for which nobody has to wait:
        the norm of the gradient, which all ranks share, then tells all of them to skip the optimizer step.
        """
        assert self._forwarded is not None, "logprobs comes first"
        (samples, logprobs), self._forwarded = self._forwarded, None
        finite_rows = logprobs.detach().isfinite().all(1)  # (B,)
        is_finite = finite_rows.all() & output.loss.detach().isfinite()
        logprobs.register_hook(lambda gradient: torch.where(is_finite, gradient, math.nan))
        self.strategy.backward(output.loss)
        self._passes.append(BackwardPass(samples, to_host(output.loss), to_host(finite_rows)))
        self._trained.append((samples, to_host(logprobs)))
        self._means_of_part.add(output)

    def step(self, data: StepData) -> None:
        """Clip the gradient, update the policy, and note loss, gradient norm and learning rate.

        Where the gradient is not finite, policy and optimizer stay as they are and the step is counted. The
        learning rate goes on, so that it depends on the number of the optimizer step alone.

        Args:
            data: of the step, for a message.

        Raises:
            RunError: more than `train.max_skipped_steps` optimizer steps in a row were skipped.
        """
        wait()
        loss = sum(self.ranks.gather(sum((one.loss.item() for one in self._passes), 0.0)))
        try:
            norm = self.strategy.step()
        except GradientNotFinite as error:
            self._skip(data, error)
        else:
            self._skipped_in_a_row = 0
            self._means.include(self._means_of_part)
            self._means.add_value("loss", loss)
            self._means.add_value("grad_norm", norm)
        self._passes.clear()
        self._means_of_part = MetricMeans()
        self._means.add_value("learning_rate", self.scheduler.get_last_lr()[0])
        self.scheduler.step()

    def _skip(self, data: StepData, error: GradientNotFinite) -> None:
        """Count an optimizer step that was not made.

        Raises:
            RunError: it is one too many.
        """
        self._skipped += 1
        self._skipped_in_a_row += 1
        count, most = self._skipped_in_a_row, self.recipe.train.max_skipped_steps
        if count <= most:
            # A schedule that goes on before the optimizer's first step is taken for a mistake.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            return
        found = NotFinite.joined(self.ranks.gather(NotFinite.of(self._passes, data.row_advantages)))
        raise RunError(
            f"step {data.step + 1}: numbers are not finite in {count} optimizer step{'s in a row' * (count > 1)}, "
            f"one more than train.max_skipped_steps ({most}) allows; the weights are those from before. "
            f"Not finite in the last one: {found.described(data.rollout, error)}"
        ) from error

    def take_logprobs(self, data: StepData) -> torch.Tensor:
        """(R, T) log π_θ of each token when the step trained on it last, NaN where it did not."""
        wait()
        own, self._trained = _placed(self._trained, data.mask.shape), []
        logprobs = self.ranks.sum(own)  # each entry is one rank's, and 0 elsewhere
        trained = torch.zeros(len(data.mask), dtype=torch.bool)
        trained[data.rows_of([group for group in data.kept if data.forwarded[group]])] = True
        return torch.where(trained[:, None] & data.mask.bool(), logprobs, math.nan)

    def take_metrics(self) -> Metrics:
        """The means over all packs of all ranks since they were taken last, and how many steps were skipped.

        What was skipped has no part in the means. Loss and gradient norm are NaN where all was.
        """
        means, self._means = self._means, MetricMeans()
        skipped, self._skipped = self._skipped, 0
        metrics = means.result(self.ranks)
        for name in ("loss", "grad_norm"):
            metrics.setdefault(name, math.nan)
        return metrics | {"train/skipped_steps": skipped}


def _placed(found: Iterable[tuple[torch.Tensor, torch.Tensor]], shape: torch.Size) -> torch.Tensor:
    """(R, T) values of a whole step from (B,) samples and (B, T) values of packs: the last where several have one,
    0 elsewhere."""
    values = torch.zeros(shape)
    for samples, of_pack in found:
        values[samples, : of_pack.shape[1]] = of_pack
    return values
