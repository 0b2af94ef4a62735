"""Rewards for the length of a completion, in characters: the smallest there are, good for a first run."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.text import Completion, completion_text

TARGET_CHARACTERS = 20


def reward_len(completions: Sequence[Completion], **_: object) -> list[float | None]:
    """Reward completions of about 20 characters: `-abs(20 - characters)`.

    Between minus infinity and 0, where 0 is exactly 20 characters. Needs no dataset column.

    Raises:
        TypeError: a completion is neither a string nor a list of messages.
    """
    return [-float(abs(TARGET_CHARACTERS - len(completion_text(completion)))) for completion in completions]


def reward_longer(completions: Sequence[Completion], **_: object) -> list[float | None]:
    """Reward long completions: the number of characters.

    From 0, without an upper end: only `generation.max_completion_tokens` holds it back. Characters are
    Unicode code points, not tokens or bytes. Needs no dataset column.

    Raises:
        TypeError: a completion is neither a string nor a list of messages.
    """
    return [float(len(completion_text(completion))) for completion in completions]
