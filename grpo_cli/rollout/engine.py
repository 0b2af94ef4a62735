"""What every rollout engine gives the training loop, whichever library generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from grpo_cli.errors import UserError

SampleKey = tuple[int, ...]
"""Names a stream of random numbers, such as (seed, stream, step, prompt): each completion adds its own index."""


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    """Sampled tokens, the end-of-sequence token included."""
    logprobs: list[float]
    """Log-probability of each token under softmax(logits / temperature) when it was sampled; NaN where the engine
    knows only that of a filtered distribution."""
    finish_reason: Literal["stop", "length"]
    """`length` when the completion was cut off at `max_completion_tokens`."""
    text: str
    """Decoded without special tokens, up to the stop string if one ended it."""


OnGroup = Callable[[int, list[Completion]], None]
"""Called with a prompt's index and its group."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Generates groups of completions."""

    def update_weights(self, version: int) -> int:
        """Generate with the policy's present weights from now on. It comes before what follows the policy's
        last update, and after `release_memory`.

        Args:
            version: of the weights: the training steps that they have seen.

        Returns:
            Bytes that were moved; 0 where the engine computes with the policy itself.

        Raises:
            ServerLost: a server stayed away.
        """
        ...

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

    def release_memory(self) -> None:
        """Generation is over for now: leave the device to training."""
        ...

    def close(self) -> None:
        """Let go of what the engine has started."""
        ...


def decoded(tokenizer: Any, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """Text of a completion without special tokens, up to the first stop string in it."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    ends = [text.find(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text


def check_lengths(prompts: Sequence[Sequence[int]], most: int, limit: int, what_to_do: str) -> None:
    """Raise UserError, which ends with `what_to_do`, if a prompt and `most` further tokens exceed `limit`."""
    longest = max(map(len, prompts), default=0)
    if longest + most > limit:
        raise UserError(
            f"a prompt of {longest} tokens and generation.max_completion_tokens ({most}) exceed {what_to_do}"
        )


def sample_uniforms(key: SampleKey, sample: int, length: int) -> np.ndarray:
    """The random numbers that decide a completion's tokens: (length,) uniforms in [0, 1)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, sample]))).random(length)
