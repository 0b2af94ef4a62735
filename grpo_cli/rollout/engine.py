"""What every rollout engine gives the training loop, whichever library generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

SampleKey = tuple[int, ...]
"""Names a stream of random numbers, such as (seed, stream, step, prompt): each completion adds its own index."""


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    """Sampled tokens, the end-of-sequence token included."""
    logprobs: list[float]
    """Log-probability of each token under softmax(logits / temperature) when it was sampled."""
    finish_reason: Literal["stop", "length"]
    """`length` when the completion was cut off at `max_completion_tokens`."""
    text: str
    """Decoded without special tokens, up to the stop string if one ended it."""


OnGroup = Callable[[int, list[Completion]], None]
"""Called with a prompt's index and its group."""


class RolloutEngine(Protocol):
    """Generates groups of completions."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """Generate `num_generations` completions for each prompt.

        Args:
            prompts: token ids of each prompt, at least one.
            keys: for each prompt, what its randomness is drawn from. The same key, prompt and weights give the
                same completions, whatever else is generated beside them (rounding in the model aside).
            num_generations: completions for each prompt.
            on_group: called from the calling thread as soon as a prompt's whole group is finished, in any order.
                What it raises ends the generation.

        Returns:
            One list of completions for each prompt.
        """
        ...


def sample_uniforms(key: SampleKey, sample: int, length: int) -> np.ndarray:
    """The random numbers that decide a completion's tokens: (length,) uniforms in [0, 1)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, sample]))).random(length)
