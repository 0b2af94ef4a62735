"""Rewards for the form of a completion, whatever it says."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.text import Completion, completion_text

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_ANSWER = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def think_answer_format(completions: Sequence[Completion], **_: object) -> list[float | None]:
    """Reward the form `<think>…</think><answer>…</answer>`: 1.0 where the completion has it, else 0.0.

    It has it when it consists of nothing else (white space before, between and after aside), holds each tag
    once and in this order, and neither body is blank. Bodies may span lines. Needs no dataset column.

    Raises:
        TypeError: a completion is neither a string nor a list of messages.
    """
    return [float(_has_think_answer_format(completion_text(completion))) for completion in completions]


def _has_think_answer_format(text: str) -> bool:
    # Once each tag is known to occur once, the greedy pattern can match in one way only, in linear time.
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _THINK_ANSWER.fullmatch(text)
    return match is not None and all(body.strip() for body in match.groups())
