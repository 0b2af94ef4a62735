"""What was not finite in a skipped optimizer step, told so that a user can act on it. No model, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from grpo_cli.report.terminal import ending
from grpo_cli.rollout.rollout import Rollout

MOST_PROMPTS = 3
"""Prompts that a message names."""


@dataclass(frozen=True)
class BackwardPass:
    """What a pack of B completions has left on the host, to be read after `transfer.wait`."""

    samples: torch.Tensor  # (B,) where each completion stands in the step's tensors
    loss: torch.Tensor  # ()
    finite_rows: torch.Tensor  # (B,) whether a completion's log-probabilities are all finite


@dataclass(frozen=True)
class NotFinite:
    """Places of rows in the step's tensors, by what was not finite about them."""

    advantages: list[int]
    logprobs: list[int]
    losses: list[int]
    """All of a pack."""

    @classmethod
    def of(cls, passes: Sequence[BackwardPass], advantages: torch.Tensor) -> NotFinite:
        """What is not finite in the passes of one optimizer step, with the step's (R,) advantages."""
        found = cls([], [], [])
        for one in passes:
            found.advantages.extend(one.samples[~advantages[one.samples].isfinite()].tolist())
            found.logprobs.extend(one.samples[~one.finite_rows].tolist())
            found.losses.extend([] if one.loss.isfinite() else one.samples.tolist())
        return found

    @classmethod
    def joined(cls, parts: Sequence[NotFinite]) -> NotFinite:
        """What several ranks have found."""
        return cls(
            sorted(row for part in parts for row in part.advantages),
            sorted(row for part in parts for row in part.logprobs),
            sorted(row for part in parts for row in part.losses),
        )

    def described(self, rollout: Rollout, gradient: object) -> str:
        """What comes first in the order of computing, where, and what to change.

        Args:
            rollout: of the step.
            gradient: what is known of the gradient.
        """
        if self.advantages:
            return (
                f"the advantages of {_places(self.advantages, rollout)}. Their rewards are too large to compute "
                "with: bound what the reward functions return, or lower rewards[].weight"
            )
        if self.logprobs:
            return (
                f"the log-probabilities of {_places(self.logprobs, rollout)}. The model's weights are damaged, "
                "were trained with too high an optim.learning_rate, or overflow: try model.compute_dtype float32"
            )
        if self.losses:
            return (
                f"the loss of {_places(self.losses, rollout)}. Lower optim.learning_rate or loss.beta; a loss "
                "function of your own must stay finite for whatever it is given"
            )
        return (
            f"the gradient ({gradient}), of a finite loss. Lower optim.learning_rate, or try model.compute_dtype "
            "float32"
        )


def _places(rows: Sequence[int], rollout: Rollout) -> str:
    """`prompt 2 (completions 1, 3), prompt 5 (completion 1), ...`, counted from 1, and the first prompt's end."""
    size = rollout.num_generations
    places = list(dict.fromkeys(rollout.row_owners[row] for row in rows))
    named = []
    for prompt, of_prompt in groupby(places, lambda place: place // size):
        numbers = [str(place % size + 1) for place in of_prompt]
        named.append(f"prompt {prompt + 1} (completion{'s' * (len(numbers) > 1)} {', '.join(numbers)})")
    more = f" and {len(named) - MOST_PROMPTS} more prompts" if len(named) > MOST_PROMPTS else ""
    first = ending(rollout.prompts[places[0] // size].content)
    return f"{', '.join(named[:MOST_PROMPTS])}{more} of this step; the first of these prompts ends in {first!r}"
