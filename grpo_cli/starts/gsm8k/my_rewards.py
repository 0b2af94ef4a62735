"""Rewards of this experiment, beside those that ship."""

from typing import Any


def has_one_box(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    r"""1.0 where the answer has exactly one `\boxed{`, else 0.0.

    The prompts are chats, so a completion is a list of messages: here one, the model's answer.
    """
    return [float(messages[-1]["content"].count(r"\boxed{") == 1) for messages in completions]
