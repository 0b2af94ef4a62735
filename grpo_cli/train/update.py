"""One optimizer step over packs, and the per-completion tensors that its losses need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_cli.algorithm.losses import MeasuredLoss, groups_to_forward, high_entropy_threshold
from grpo_cli.algorithm.packing import Group, Pack, deal_groups, empty_pack, pack_groups
from grpo_cli.algorithm.sampler_correction import sampler_ratio
from grpo_cli.algorithm.transfer import to_device, to_host, wait
from grpo_cli.distributed.strategies.base import GradientNotFinite
from grpo_cli.errors import RunError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.model import evaluating
from grpo_cli.recipe.limits import automatic_microbatch_tokens
from grpo_cli.recipe.schema import SamplerCorrectionConfig
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.metrics import MetricMeans
from grpo_cli.train.run import Run
from grpo_cli.train.session import Session


def packs_of(run: Run, groups: Sequence[Group]) -> list[Pack]:
    """This rank's packs of some groups, as the model takes them and the device can hold them.

    Groups stay whole. Where the ranks must run alike, all have as many packs, at least one.
    """
    configured = run.recipe.train.max_tokens_per_microbatch
    longest = max((len(group.prompt) for group in groups), default=0)
    budget = configured or automatic_microbatch_tokens(run.ranks.device.type, longest)
    own = deal_groups(groups, run.ranks.world_size)[run.ranks.rank]
    packs = pack_groups(own, budget, shared_prompt=run.shared_prompt)
    if run.strategy.runs_alike:
        most = max(1, *run.ranks.gather(len(packs)))
        packs += [empty_pack(shared_prompt=run.shared_prompt)] * (most - len(packs))
    return packs


@dataclass(frozen=True)
class StepTensors:
    """What belongs to a step's N completions of at most T tokens, on the CPU; the `…_of` methods give a pack's
    share of it, on its device."""

    trained: torch.Tensor  # (N,) False for completions that stay out of the loss
    mask: torch.Tensor  # (N, T) 1 on tokens that are trained on
    sampling_logprobs: torch.Tensor  # (N, T) NaN where the engine did not report one
    ref_logprobs: torch.Tensor | None  # (N, T)
    old_logprobs: torch.Tensor  # (N, T) under the policy that sampled, where `has_old` says so
    has_old: torch.Tensor  # (N,)
    kept_logprobs: dict[int, torch.Tensor] = field(default_factory=dict)
    """The same of packs that were not scored beforehand, by their first sample: (B, T), on their device."""

    @classmethod
    def prepare(cls, run: Run, rollout: Rollout, kept: Sequence[int]) -> StepTensors:
        """Gather what is known without rewards; `kept` are the groups that the step trains on."""
        completions, size = rollout.completions, rollout.num_generations
        is_truncated = torch.tensor([completion.finish_reason == "length" for completion in completions])
        trained = ~is_truncated | (not run.recipe.loss.mask_truncated)
        sampled = [torch.tensor(completion.logprobs) for completion in completions]
        sampling_logprobs = pad_sequence(sampled, batch_first=True)  # (N, T)
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        mask = (torch.arange(sampling_logprobs.shape[1]) < lengths[:, None]) & trained[:, None]
        ref_logprobs = None
        if run.reference is not None:
            ref_logprobs = torch.zeros_like(sampling_logprobs)
            needed = groups_to_forward(torch.zeros(len(completions)), trained, size, run.recipe.loss)
            groups = rollout.groups()
            packs = packs_of(run, [groups[index] for index in kept if needed[index]])
            with run.reference.model() as reference:
                _score(run, reference, packs, logprobs=ref_logprobs)
            # A group may be another rank's when it is trained on. Each entry is one rank's, and 0 elsewhere.
            ref_logprobs = run.ranks.sum(ref_logprobs)
        old, has_old = torch.zeros_like(sampling_logprobs), torch.zeros_like(trained)
        return cls(trained, mask.float(), sampling_logprobs, ref_logprobs, old, has_old)

    def score_old(self, run: Run, minibatches: Sequence[Sequence[Pack]]) -> None:
        """Compute the old log-probabilities that cannot be had from the packs' own forward passes.

        The first optimizer step trains the policy that sampled, so the log-probabilities that it trains on are
        the old ones. Later packs are scored before the policy moves. An adapter's dropout makes a pass of
        training noisy: later iterations would divide by that noise, so then all packs are scored without it.
        """
        lora, config = run.recipe.model.lora, run.recipe.train
        is_noisy = lora is not None and lora.dropout > 0
        first = 0 if is_noisy and config.num_iterations > 1 else 1
        packs = [pack for minibatch in minibatches[first:] for pack in minibatch]
        _score(run, run.policy, packs, logprobs=self.old_logprobs)
        for pack in packs:
            self.has_old[pack.samples] = True

    def mask_of(self, pack: Pack) -> torch.Tensor:
        """(B, T), 1 on tokens that are trained on."""
        return self.share(self.mask, pack)

    def sampling_logprobs_of(self, pack: Pack) -> torch.Tensor:
        """(B, T)"""
        return self.share(self.sampling_logprobs, pack)

    def old_logprobs_of(self, pack: Pack, logprobs: torch.Tensor) -> torch.Tensor:
        """(B, T); those of the policy itself while nothing has been updated since the rollout: they are kept."""
        if self.has_old[pack.samples].all():
            return self.share(self.old_logprobs, pack)
        return self.kept_logprobs.setdefault(int(pack.samples[0]), logprobs.detach())

    def sampler_ratio_of(
        self, pack: Pack, logprobs: torch.Tensor, config: SamplerCorrectionConfig | None
    ) -> torch.Tensor | None:
        """(B, T) or (B, 1), old policy over sampler; None without a correction."""
        if config is None:
            return None
        old = self.old_logprobs_of(pack, logprobs)
        return sampler_ratio(old, self.sampling_logprobs_of(pack), self.mask_of(pack), config)

    def ref_logprobs_of(self, pack: Pack) -> torch.Tensor | None:
        """(B, T)"""
        return None if self.ref_logprobs is None else self.share(self.ref_logprobs, pack)

    @staticmethod
    def share(values: torch.Tensor, pack: Pack) -> torch.Tensor:
        """(N,) or (N, T) values of the whole step to the (B,) or (B, T) of a pack, on its device."""
        share = values[pack.samples]
        if share.dim() == 2:
            share = share[:, : pack.mask.shape[1]]
        return to_device(share, pack.mask.device)


@torch.no_grad()
def _score(
    run: Run,
    model: PackedModel,
    packs: Sequence[Pack],
    *,
    logprobs: torch.Tensor | None = None,
    entropies: torch.Tensor | None = None,
) -> None:
    """Fill the given (N, T) tensors with the log-probabilities and entropies of `packs` under `model`."""
    targets = [logprobs, entropies]
    found: list[list[torch.Tensor | None]] = []
    with evaluating(model.model):
        for pack in packs:
            with run.autocast():
                outputs = model.token_logprobs(run.to_device(pack), run.recipe.generation.temperature)
            pairs = zip(outputs, targets, strict=True)
            found.append([None if target is None else to_host(values) for values, target in pairs])
    wait()
    for pack, outputs_on_host in zip(packs, found, strict=True):
        for target, values in zip(targets, outputs_on_host, strict=True):
            if target is not None and values is not None:
                target[pack.samples, : pack.mask.shape[1]] = values


class OptimizerStep:
    """Accumulates the gradient of some packs and applies it."""

    def __init__(self, run: Run, session: Session, packs: Sequence[Pack], tensors: StepTensors, step: int) -> None:
        self._run = run
        self._scheduler = session.scheduler
        self._step = step
        self._losses: list[torch.Tensor] = []
        self.entropy_threshold = self._entropy_threshold(packs, tensors)
        run.strategy.zero_grad()

    def _entropy_threshold(self, packs: Sequence[Pack], tensors: StepTensors) -> float | None:
        """The quantile of entropies over all packs of all ranks, which no pack can know alone."""
        ranks, quantile = self._run.ranks, self._run.recipe.loss.top_entropy_quantile
        if quantile == 1 or (ranks.world_size == 1 and len(packs) <= 1):
            return None
        entropies = torch.zeros_like(tensors.sampling_logprobs)  # (N, T)
        mask = torch.zeros_like(entropies)
        _score(self._run, self._run.policy, packs, entropies=entropies)
        for pack in packs:
            mask[pack.samples, : pack.mask.shape[1]] = tensors.mask_of(pack)
        return high_entropy_threshold(ranks.sum(entropies), ranks.sum(mask), quantile).item()

    def backward(self, output: MeasuredLoss) -> None:
        self._run.strategy.backward(output.loss)
        self._losses.append(to_host(output.loss))

    def apply(self, means: MetricMeans) -> None:
        """Clip the gradient, update the policy, and note loss, gradient norm and learning rate.

        Raises:
            RunError: the gradient is not finite; the policy is not to be used any more.
        """
        wait()
        loss = sum(self._run.ranks.gather(sum((loss.item() for loss in self._losses), 0.0)))
        try:
            norm = self._run.strategy.step()
        except GradientNotFinite as error:
            raise RunError(
                f"step {self._step + 1}: the gradient is not finite ({error}, loss {loss}); "
                "lower optim.learning_rate, or look at the completions of the last steps"
            ) from error
        means.add_value("loss", loss)
        means.add_value("grad_norm", norm)
        means.add_value("learning_rate", self._scheduler.get_last_lr()[0])
        self._scheduler.step()
