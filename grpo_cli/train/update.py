"""One optimizer step over packs, and the per-completion tensors that its losses need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_cli.algorithm.losses import LossOutput, high_entropy_threshold
from grpo_cli.algorithm.packing import Pack
from grpo_cli.errors import RunError
from grpo_cli.policy.logprobs import token_logprobs
from grpo_cli.policy.model import evaluating
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.metrics import MetricMeans
from grpo_cli.train.run import Run
from grpo_cli.train.session import Session


@dataclass(frozen=True)
class StepTensors:
    """What belongs to a step's N completions of at most T tokens; the `…_of` methods give a pack's share of it."""

    advantages: torch.Tensor  # (N,)
    trained: torch.Tensor  # (N,) False for completions that stay out of the loss
    sampling_logprobs: torch.Tensor  # (N, T)
    old_logprobs: torch.Tensor | None  # (N, T), None where the policy that sampled is the one that is trained
    ref_logprobs: torch.Tensor | None  # (N, T)

    @classmethod
    def prepare(
        cls, run: Run, rollout: Rollout, advantages: torch.Tensor, minibatches: Sequence[Sequence[Pack]]
    ) -> StepTensors:
        """Compute, without gradients, what the step's losses compare the policy with."""
        completions = rollout.completions
        is_truncated = torch.tensor([completion.finish_reason == "length" for completion in completions])
        sampled = [torch.tensor(completion.logprobs) for completion in completions]
        sampling_logprobs = pad_sequence(sampled, batch_first=True)  # (N, T)
        packs = [pack for minibatch in minibatches for pack in minibatch]
        policy_moves = len(minibatches) * run.recipe.train.num_iterations > 1
        old_logprobs = ref_logprobs = None
        if policy_moves:
            old_logprobs = torch.zeros_like(sampling_logprobs)
            _score(run, run.model, packs, logprobs=old_logprobs)
        if run.reference is not None:
            ref_logprobs = torch.zeros_like(sampling_logprobs)
            with run.reference.model() as reference:
                _score(run, reference, packs, logprobs=ref_logprobs)
        trained = ~is_truncated | (not run.recipe.loss.mask_truncated)
        return cls(advantages, trained, sampling_logprobs, old_logprobs, ref_logprobs)

    def advantages_of(self, pack: Pack) -> torch.Tensor:
        """(B,)"""
        return self._share(self.advantages, pack)

    def mask_of(self, pack: Pack) -> torch.Tensor:
        """(B, T), 1 on tokens that are trained on."""
        return (pack.mask & self._share(self.trained, pack)[:, None]).float()

    def sampling_logprobs_of(self, pack: Pack) -> torch.Tensor:
        """(B, T)"""
        return self._share(self.sampling_logprobs, pack)

    def old_logprobs_of(self, pack: Pack, logprobs: torch.Tensor) -> torch.Tensor:
        """(B, T); those of the policy itself while nothing has been updated since the rollout."""
        return logprobs.detach() if self.old_logprobs is None else self._share(self.old_logprobs, pack)

    def ref_logprobs_of(self, pack: Pack) -> torch.Tensor | None:
        """(B, T)"""
        return None if self.ref_logprobs is None else self._share(self.ref_logprobs, pack)

    @staticmethod
    def _share(values: torch.Tensor, pack: Pack) -> torch.Tensor:
        share = values[pack.samples.to(values.device)]
        if share.dim() == 2:
            share = share[:, : pack.mask.shape[1]]
        return share.to(pack.mask.device)


@torch.no_grad()
def _score(
    run: Run,
    model: Any,
    packs: Sequence[Pack],
    *,
    logprobs: torch.Tensor | None = None,
    entropies: torch.Tensor | None = None,
) -> None:
    """Fill the given (N, T) tensors with the log-probabilities and entropies of `packs` under `model`."""
    with evaluating(model):
        for pack in packs:
            with run.autocast():
                outputs = token_logprobs(model, run.to_device(pack), run.recipe.generation.temperature)
            for target, values in zip((logprobs, entropies), outputs, strict=True):
                if target is not None:
                    target[pack.samples, : pack.mask.shape[1]] = values.cpu()


class OptimizerStep:
    """Accumulates the gradient of some packs and applies it."""

    def __init__(self, run: Run, session: Session, packs: Sequence[Pack], tensors: StepTensors, step: int) -> None:
        self._run = run
        self._optimizer = session.optimizer
        self._scheduler = session.scheduler
        self._step = step
        self._loss = 0.0
        self.entropy_threshold = self._entropy_threshold(packs, tensors)
        run.model.zero_grad()

    def _entropy_threshold(self, packs: Sequence[Pack], tensors: StepTensors) -> float | None:
        """The quantile of entropies over all packs, which no pack can know alone."""
        quantile = self._run.recipe.loss.top_entropy_quantile
        if quantile == 1 or len(packs) == 1:
            return None
        entropies = torch.zeros_like(tensors.sampling_logprobs)  # (N, T)
        mask = torch.zeros_like(entropies)
        _score(self._run, self._run.model, packs, entropies=entropies)
        for pack in packs:
            mask[pack.samples, : pack.mask.shape[1]] = tensors.mask_of(pack)
        return high_entropy_threshold(entropies, mask, quantile)

    def backward(self, output: LossOutput) -> None:
        self._run.accelerator.backward(output.loss)
        self._loss += output.loss.item()

    def apply(self, means: MetricMeans) -> None:
        """Clip the gradient, update the policy, and note loss, gradient norm and learning rate.

        Raises:
            RunError: the gradient is not finite; the policy is as it was.
        """
        max_norm = self._run.recipe.optim.max_grad_norm
        norm = float(self._run.accelerator.clip_grad_norm_(self._run.model.parameters(), max_norm))
        if not math.isfinite(norm):
            raise RunError(
                f"step {self._step + 1}: the gradient is not finite (norm {norm}, loss {self._loss}); "
                "lower optim.learning_rate, or look at the completions of the last steps"
            )
        means.add_value("loss", self._loss)
        means.add_value("grad_norm", norm)
        means.add_value("learning_rate", self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._scheduler.step()
