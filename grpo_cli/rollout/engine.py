"""What generates: engines give turns as they finish, and what is built on them gives whole groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from grpo_cli.data.prompts import Prompt
from grpo_cli.errors import UserError

SampleKey = tuple[int, ...]
"""Names a stream of random numbers, such as (seed, stream, step, prompt): each completion adds its own index."""


@dataclass(frozen=True)
class Turn:
    """One turn of a completion, as an engine is asked for it."""

    completion: int
    """Which completion goes on with it: a number of its own in the stream."""
    group: int
    """Of completions that begin alike."""
    token_ids: Sequence[int]
    """All that the policy reads: the prompt, and in later turns what was said since."""
    key: SampleKey
    """Of the prompt's randomness."""
    sample: int
    """Place of the completion in its group."""
    number: int
    """Turns of the completion before this one."""
    max_tokens: int
    may_go_on: bool
    """Whether a further turn may be asked for, which begins with what this one has read and said."""

    def uniforms(self) -> np.ndarray:
        """The random numbers that decide its tokens: (max_tokens,) uniforms in [0, 1)."""
        if self.number:
            return sample_uniforms((*self.key, self.sample), self.number, self.max_tokens)
        return sample_uniforms(self.key, self.sample, self.max_tokens)


@dataclass(frozen=True)
class SampledTurn:
    token_ids: list[int]
    """Sampled tokens, the end-of-sequence token included."""
    logprobs: list[float]
    """Log-probability of each token under softmax(logits / temperature) when it was sampled; NaN where the engine
    knows only that of a filtered distribution."""
    finish_reason: Literal["stop", "length"]
    """`length` when it was cut off at `max_tokens`."""
    text: str
    """Decoded without special tokens, up to the stop string if one ended it."""


FinishReason = Literal["stop", "length", "max_turns", "tool_failed", "lost"]
"""Why a completion ended: by itself; at `max_completion_tokens`; at `episode.max_turns`, about to be answered; a
call failed, and `episode.on_error` is end; its environment could not be reset, so there is nothing of it."""


@dataclass(frozen=True)
class SampledRow:
    """Tokens that were read and said one after the other. A completion has several where its chat template writes
    the history anew: each begins with what was read then."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    """NaN on tokens that were not sampled."""
    sampled: list[bool] | None
    """Which of `token_ids` the policy sampled; None for all."""


@dataclass(frozen=True)
class ToolUse:
    """What a completion did with its tools."""

    calls: int = 0
    failures: int = 0
    """Calls that were wrong, raised or took too long."""
    unknown_names: int = 0
    """Calls of tools that there are not."""
    timeouts: int = 0
    """Calls that were given up, and answers of environments that were."""
    seconds: float = 0.0
    """Of all calls."""

    def __add__(self, other: ToolUse) -> ToolUse:
        return ToolUse(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))


NO_USE = ToolUse()


@dataclass(frozen=True)
class Completion:
    """Everything after the prompt: what the policy sampled, and what was answered in between."""

    token_ids: list[int]
    """Of its last row, if it has several."""
    logprobs: list[float]
    """As of `SampledTurn`; NaN on tokens that were not sampled."""
    finish_reason: FinishReason
    text: str
    """Of a single turn, as of `SampledTurn`; of several, one after the other."""
    sampled: list[bool] | None = None
    """Which of `token_ids` the policy sampled; None for all."""
    messages: list[dict[str, Any]] | None = None
    """The conversation after the prompt; None for the text alone."""
    turns: int = 1
    prompt: Prompt | None = None
    """What it follows, if an environment has added to the prompt."""
    prompt_ids: list[int] | None = None
    """What its last row was said after, if that is not the prompt."""
    earlier: tuple[SampledRow, ...] = ()
    """Its other rows."""
    tools: ToolUse = NO_USE
    environment: Any = None
    """Its environment as it was left, in the process that played it."""
    reset_s: float = 0.0
    """Seconds of its environment's reset."""

    def rows(self, prompt: Prompt) -> list[SampledRow]:
        """Its rows, the last one last."""
        own = self.prompt or prompt
        last = SampledRow(self.prompt_ids or own.token_ids, self.token_ids, self.logprobs, self.sampled)
        return [*self.earlier, last]

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        last = len(self.token_ids) if self.sampled is None else sum(self.sampled)
        return last + sum(len(row.token_ids) if row.sampled is None else sum(row.sampled) for row in self.earlier)


@dataclass(frozen=True)
class Demand:
    """What a stream will be asked for at most, so that its memory is made once."""

    completions: int
    groups: int
    """Of completions that begin alike; where environments may begin each otherwise, as many as completions."""
    group_size: int
    """Completions of the largest group."""


OnTurn = Callable[[int, SampledTurn | Exception], None]
"""Called with the number of a completion and its turn, or with what became of it; from any thread."""

OnGroup = Callable[[int, list[Completion]], None]
"""Called with a prompt's index and its group."""


class TurnStream(Protocol):
    """Turns that are generated while others are asked for."""

    def ask(self, turns: Sequence[Turn]) -> None:
        """Generate these, too. The first turns of a group come together, and later turns as they may.

        Raises:
            UserError: one is longer than the engine can take.
        """
        ...

    def advance(self) -> bool:
        """Compute a little, on the calling thread; return False if there is nothing to compute on it."""
        ...

    def forget(self, completion: int) -> None:
        """No further turn of this completion will be asked for, though it might have gone on."""
        ...


@runtime_checkable
class TurnEngine(Protocol):
    """Generates turns."""

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

    def stream(self, on_turn: OnTurn, demand: Demand) -> AbstractContextManager[TurnStream]:
        """Take turns in and give them out as they finish; what is unfinished at the end is dropped.

        The same key, tokens and weights give the same turn, whatever else is generated beside it (rounding in the
        model aside).
        """
        ...

    def release_memory(self) -> None:
        """Generation is over for now: leave the device to training."""
        ...

    def close(self) -> None:
        """Let go of what the engine has started."""
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Generates groups of whole completions."""

    def update_weights(self, version: int) -> int:
        """As of `TurnEngine`."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """Generate `num_generations` completions for each prompt.

        Args:
            prompts: each of at least one token.
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
        """As of `TurnEngine`."""
        ...

    def close(self) -> None:
        """As of `TurnEngine`."""
        ...


def decoded(tokenizer: Any, token_ids: Sequence[int], stop: Sequence[str]) -> str:
    """Text of a completion without special tokens, up to the first stop string in it."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    ends = [text.find(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text


def check_lengths(turns: Sequence[Turn], limit: int, what_to_do: str) -> None:
    """Raise UserError, which ends with `what_to_do`, if what a turn reads and may say exceeds `limit` tokens."""
    longest = max(turns, key=lambda turn: len(turn.token_ids) + turn.max_tokens)
    if len(longest.token_ids) + longest.max_tokens > limit:
        raise UserError(
            f"a prompt of {len(longest.token_ids)} tokens and generation.max_completion_tokens "
            f"({longest.max_tokens}) exceed {what_to_do}"
        )


def sample_uniforms(key: SampleKey, sample: int, length: int) -> np.ndarray:
    """The random numbers that decide a completion's tokens: (length,) uniforms in [0, 1)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, sample]))).random(length)
