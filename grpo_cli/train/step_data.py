"""What a step trains on: completions, what they earned, and the tensors of its loss. No I/O, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_cli.algorithm.packing import Pack
from grpo_cli.algorithm.transfer import to_device
from grpo_cli.record.metrics import Metrics
from grpo_cli.reward.hooks import Plain
from grpo_cli.rollout.rollout import Rollout


@dataclass(frozen=True)
class StepData:
    """N completions of P prompts in R rows of at most T tokens each; tensors lie on the CPU.

    A completion is one row, unless its chat template writes the history anew.
    """

    step: int
    """Counted from 0."""
    rollout: Rollout
    """Every group that was generated, the dropped ones too."""
    kept: list[int]
    """The groups that the step trains on."""
    rewards: torch.Tensor  # (N, K), NaN where a function did not apply
    advantages: torch.Tensor  # (N,)
    owners: torch.Tensor  # (R,) < N
    mask: torch.Tensor  # (R, T) 1 on tokens that are trained on
    sampling_logprobs: torch.Tensor  # (R, T) NaN where the engine did not report one
    ref_logprobs: torch.Tensor | None  # (R, T)
    forwarded: torch.Tensor  # (P,) False for groups without a gradient
    epoch: float
    """Passes over the prompts after this step."""
    metrics: Metrics
    extras: dict[str, list[Plain]]
    """What reward functions have logged of the N completions, by column."""

    @property
    def row_advantages(self) -> torch.Tensor:
        """(R,)"""
        return self.advantages[self.owners]

    @cached_property
    def completion_tokens(self) -> torch.Tensor:
        """(R,) tokens that are trained on of the completion that a row is of."""
        of_completion = torch.zeros(len(self.advantages)).index_add_(0, self.owners, self.mask.sum(-1))  # (N,)
        return of_completion[self.owners]

    def rows_of(self, groups: Sequence[int]) -> torch.Tensor:
        """The places of the rows of some groups."""
        group_of = self.owners // self.rollout.num_generations  # (R,)
        return torch.isin(group_of, torch.tensor(groups, dtype=torch.long)).nonzero()[:, 0]

    def of(self, pack: Pack) -> PackData:
        """The share of one pack, on its device."""
        reference = None if self.ref_logprobs is None else share(self.ref_logprobs, pack)
        advantages = share(self.row_advantages, pack)
        mask, sampling_logprobs = share(self.mask, pack), share(self.sampling_logprobs, pack)
        return PackData(advantages, mask, sampling_logprobs, reference, share(self.completion_tokens, pack))


@dataclass(frozen=True)
class PackData:
    """A pack's B rows of at most T tokens; tensors lie on the pack's device."""

    advantages: torch.Tensor  # (B,)
    mask: torch.Tensor  # (B, T) 1 on tokens that are trained on
    sampling_logprobs: torch.Tensor  # (B, T)
    ref_logprobs: torch.Tensor | None  # (B, T)
    completion_tokens: torch.Tensor  # (B,) that are trained on of the completion that a row is of


class OldLogprobs:
    """log π_old: of each token under the policy as it was before the step's first update.

    Args:
        scored: (R, T), on the CPU.
        is_scored: (R,), whether a row of it holds something.
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
    """(R,) or (R, T) values of a whole step to the (B,) or (B, T) of a pack, on its device."""
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
        rollout: N completions in R rows.
        trained: (N,), from `trained_completions`.

    Returns:
        (R, T) 1 on tokens that are trained on, and (R, T) log-probabilities under what sampled them.
    """
    sampling_logprobs = pad_sequence([torch.tensor(row.logprobs) for row in rollout.rows], batch_first=True)
    lengths = torch.tensor([len(row.token_ids) for row in rollout.rows])
    mask = (torch.arange(sampling_logprobs.shape[1]) < lengths[:, None]) & trained[rollout.row_owners][:, None]
    for own, row in zip(mask, rollout.rows, strict=True):
        if row.sampled is not None:
            own[: len(row.sampled)] &= torch.tensor(row.sampled, dtype=torch.bool)
    return mask.float(), sampling_logprobs
