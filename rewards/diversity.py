"""Rewards for the variety of a completion."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.text import Completion, completion_text


def reward_num_unique_chars(completions: Sequence[Completion], **_: object) -> list[float | None]:
    """Reward varied completions: the number of distinct characters, `len(set(text))`.

    From 0 (an empty completion). Characters are Unicode code points; upper and lower case differ and white
    space counts. Needs no dataset column.

    Raises:
        TypeError: a completion is neither a string nor a list of messages.
    """
    return [float(len(set(completion_text(completion)))) for completion in completions]
