"""What a step trains on: completions, what they earned, and the tensors of its loss. No I/O, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_cli.algorithm.packing import Pack
from grpo_cli.algorithm.transfer import to_device
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.metrics import Metrics


@dataclass(frozen=True)
class StepData:
    """N completions of P prompts, at most T tokens each; tensors lie on the CPU."""

    step: int
    """Counted from 0."""
    rollout: Rollout
    """Every group that was generated, the dropped ones too."""
    kept: list[int]
    """The groups that the step trains on."""
    rewards: torch.Tensor  # (N, K), NaN where a function did not apply
    advantages: torch.Tensor  # (N,)
    mask: torch.Tensor  # (N, T) 1 on tokens that are trained on
    sampling_logprobs: torch.Tensor  # (N, T) NaN where the engine did not report one
    ref_logprobs: torch.Tensor | None  # (N, T)
    forwarded: torch.Tensor  # (P,) False for groups without a gradient
    epoch: float
    """Passes over the prompts after this step."""
    metrics: Metrics

    def of(self, pack: Pack) -> PackData:
        """The share of one pack, on its device."""
        reference = None if self.ref_logprobs is None else share(self.ref_logprobs, pack)
        return PackData(
            share(self.advantages, pack), share(self.mask, pack), share(self.sampling_logprobs, pack), reference
        )


@dataclass(frozen=True)
class PackData:
    """A pack's B completions of at most T tokens; tensors lie on the pack's device."""

    advantages: torch.Tensor  # (B,)
    mask: torch.Tensor  # (B, T) 1 on tokens that are trained on
    sampling_logprobs: torch.Tensor  # (B, T)
    ref_logprobs: torch.Tensor | None  # (B, T)


class OldLogprobs:
    """log π_old: of each token under the policy as it was before the step's first update.

    Args:
        scored: (N, T), on the CPU.
        is_scored: (N,), whether a completion's row of it holds something.
    """

    def __init__(self, scored: torch.Tensor, is_scored: torch.Tensor) -> None:
        self._scored = scored
        self._is_scored = is_scored
        self._kept: dict[int, torch.Tensor] = {}  # (B, T) of packs that were not scored, by their first sample

    def keep(self, pack: Pack, logprobs: torch.Tensor) -> None:
        """Keep a pack's first log-probabilities, (B, T), where nothing else was scored: the policy that sampled is
        the one that they were computed with. They stay on their device for later iterations."""
        if not self._has_scored(pack):
            self._kept.setdefault(int(pack.samples[0]), logprobs.detach())

    def of(self, pack: Pack) -> torch.Tensor:
        """(B, T), on the pack's device."""
        if self._has_scored(pack):
            return share(self._scored, pack)
        return self._kept[int(pack.samples[0])]

    def _has_scored(self, pack: Pack) -> bool:
        return bool(self._is_scored[pack.samples].all())


def share(values: torch.Tensor, pack: Pack) -> torch.Tensor:
    """(N,) or (N, T) values of a whole step to the (B,) or (B, T) of a pack, on its device."""
    own = values[pack.samples]
    if own.dim() == 2:
        own = own[:, : pack.mask.shape[1]]
    return to_device(own, pack.mask.device)


def rows_of(groups: Sequence[int], num_generations: int) -> torch.Tensor:
    """Where the completions of some groups stand in a step's (N, ...) tensors."""
    starts = torch.tensor(groups, dtype=torch.long) * num_generations
    return (starts[:, None] + torch.arange(num_generations)).flatten()


def trained_completions(rollout: Rollout, *, mask_truncated: bool) -> torch.Tensor:
    """(N,) whether a completion is in the loss: under `mask_truncated` those that were cut off are not."""
    is_truncated = torch.tensor([completion.finish_reason == "length" for completion in rollout.completions])
    return ~is_truncated | (not mask_truncated)


def token_tensors(rollout: Rollout, trained: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of a rollout and what its engine says of its tokens.

    Args:
        rollout: N completions.
        trained: (N,), from `trained_completions`.

    Returns:
        (N, T) 1 on tokens that are trained on, and (N, T) log-probabilities under what sampled them.
    """
    sampled = [torch.tensor(completion.logprobs) for completion in rollout.completions]
    sampling_logprobs = pad_sequence(sampled, batch_first=True)  # (N, T)
    lengths = torch.tensor([len(completion.token_ids) for completion in rollout.completions])
    mask = (torch.arange(sampling_logprobs.shape[1]) < lengths[:, None]) & trained[:, None]
    return mask.float(), sampling_logprobs
