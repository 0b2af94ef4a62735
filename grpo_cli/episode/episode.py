"""A completion while it is played: its tokens as they were sampled, and what was answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_cli.data.prompts import Prompt
from grpo_cli.episode.environments import EnvironmentKind
from grpo_cli.episode.tools import Tool
from grpo_cli.rollout.engine import (
    NO_USE,
    Completion,
    FinishReason,
    SampledRow,
    SampledTurn,
    SampleKey,
    ToolUse,
    Turn,
)

Message = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """What an episode begins with."""

    prompt: Prompt
    """With what the environment has added to it."""
    tools: Mapping[str, Tool] = field(default_factory=dict)
    kind: EnvironmentKind | None = None
    environment: Any = None
    reset_s: float = 0.0

    @property
    def methods(self) -> set[str]:
        """Names of the tools that are the environment's."""
        return set() if self.kind is None else {tool.name for tool in self.kind.tools}


@dataclass
class Episode:
    """The state of one completion.

    Args:
        number: of the completion.
        key: of its prompt's randomness.
        sample: its place in the group.
        start: what it begins with.
        limit: of its tokens, those of answers included.
    """

    number: int
    key: SampleKey
    sample: int
    start: Start
    limit: int
    prompt_ids: list[int] = field(init=False)
    """What the present row was said after."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    earlier: list[SampledRow] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Of the turns."""
    spent: int = 0
    """Tokens that count towards the limit."""
    tools: ToolUse = NO_USE
    hangs: bool = False
    """A call that was given up is still at work in its environment."""

    def __post_init__(self) -> None:
        self.prompt_ids = list(self.start.prompt.token_ids)

    @property
    def context(self) -> list[int]:
        """All that the next turn reads."""
        return self.prompt_ids + self.token_ids

    @property
    def room(self) -> int:
        """Tokens that the next turn may sample."""
        beyond = len(self.prompt_ids) - len(self.start.prompt.token_ids) + len(self.token_ids)
        return self.limit - max(self.spent, beyond)

    def turn(self, group: int, *, may_go_on: bool) -> Turn:
        """The next turn."""
        return Turn(
            self.number,
            group,
            self.context,
            self.key,
            self.sample,
            len(self.texts),
            self.room,
            may_go_on=may_go_on,
        )

    def take(self, turn: SampledTurn, message: Message | None = None) -> None:
        """Add a turn, and the message that it is where there are messages."""
        self.token_ids += turn.token_ids
        self.logprobs += turn.logprobs
        self.sampled += [True] * len(turn.token_ids)
        self.spent += len(turn.token_ids)
        self.texts.append(turn.text)
        if message is not None:
            self.messages.append(message)

    def read(self, token_ids: Sequence[int], messages: Sequence[Message]) -> None:
        """Add what was answered, behind what was said."""
        self.token_ids += token_ids
        self.logprobs += [math.nan] * len(token_ids)
        self.sampled += [False] * len(token_ids)
        self.spent += len(token_ids)
        self.messages += messages

    def begin_anew(self, context: Sequence[int], answered: int, messages: Sequence[Message]) -> None:
        """Go on in a row of its own, since the history is written anew.

        Args:
            context: the whole conversation, the answer included.
            answered: tokens of the answer, which count towards the limit.
            messages: the answer.
        """
        self.earlier.append(SampledRow(self.prompt_ids, self.token_ids, self.logprobs, self.sampled))
        self.prompt_ids, self.token_ids, self.logprobs, self.sampled = list(context), [], [], []
        self.spent += answered
        self.messages += messages

    def completion(self, reason: FinishReason, given: Prompt) -> Completion:
        """What it has become; `given` is the prompt before an environment added to it."""
        own = self.start.prompt
        return Completion(
            self.token_ids,
            self.logprobs,
            reason,
            "\n".join(self.texts),
            None if all(self.sampled) else self.sampled,
            self.messages or None,
            max(len(self.texts), 1),
            None if own is given else own,
            self.prompt_ids if self.earlier else None,
            tuple(self.earlier),
            self.tools,
            None if self.hangs else self.start.environment,
            self.start.reset_s,
        )
