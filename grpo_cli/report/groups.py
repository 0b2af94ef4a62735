"""What is said of a group of stored completions as a whole. No I/O."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from grpo_cli.record.completions import StoredCompletion


@dataclass(frozen=True)
class GroupSummary:
    """The completions of one prompt of a step."""

    group: int
    completions: Sequence[StoredCompletion]
    rewards: Sequence[float | None]
    """Weighted sum of each completion's rewards; None where no function applied."""

    @property
    def known_rewards(self) -> list[float]:
        return [reward for reward in self.rewards if reward is not None]

    @property
    def spread(self) -> float:
        """Standard deviation of the known rewards (ddof 1); 0 of fewer than two."""
        return statistics.stdev(self.known_rewards) if len(self.known_rewards) > 1 else 0.0

    def mean_of(self, name: str) -> float | None:
        """Of a reward function, over the completions to which it applied; None if there is none."""
        scores = [score for one in self.completions if (score := one.rewards.get(name)) is not None]
        return statistics.fmean(scores) if scores else None

    @property
    def lengths(self) -> list[int]:
        """In sampled tokens."""
        return [one.num_sampled for one in self.completions]

    @property
    def truncated(self) -> int:
        """Completions that were cut off at their limit."""
        return sum(one.finish_reason == "length" for one in self.completions)

    @property
    def is_trained_on(self) -> bool:
        """Whether any of its tokens was forwarded in training."""
        return any(value is not None for one in self.completions for value in one.policy_logprobs)


def groups_of(completions: Sequence[StoredCompletion], weights: Mapping[str, float]) -> list[GroupSummary]:
    """The groups of a step, in their order.

    Args:
        completions: of the step, those of a group neighbours.
        weights: by reward function, 1 where there is none.
    """
    found = []
    for number, members in groupby(completions, lambda one: one.group):
        group = list(members)
        found.append(GroupSummary(number, group, [reward_of(one, weights) for one in group]))
    return found


def reward_of(completion: StoredCompletion, weights: Mapping[str, float]) -> float | None:
    """The weighted sum of its rewards; None where no function applied."""
    scores = [weights.get(name, 1.0) * score for name, score in completion.rewards.items() if score is not None]
    return sum(scores) if scores else None
