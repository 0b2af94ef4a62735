"""Scripted episodes that TRL's own tool loop plays when they are recorded, and ours when they are tested."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

QUESTION = [
    {"role": "system", "content": "You may call tools."},
    {"role": "user", "content": "What is 8 + 9?"},
]
LIMIT = 400
"""Tokens of a completion."""


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        Their sum.
    """
    return a + b


def divide(a: float, b: float) -> float:
    """
    Divides a number by another.

    Args:
        a: The number.
        b: What it is divided by.

    Returns:
        The quotient.
    """
    return a / b


def look_up(word: str) -> dict[str, Any]:
    """
    Looks a word up.

    Args:
        word: The word.

    Returns:
        What it means, and how often it is asked for.
    """
    return {"word": word, "meaning": None, "asked": [1, 2.5], "is_known": word == "known"}


async def ask(question: str) -> str:
    """
    Asks somebody who takes time.

    Args:
        question: What to ask.

    Returns:
        The answer.
    """
    return f"{question}? Yes.\n"


TOOLS = [add, divide, look_up, ask]


class Counter:
    """An environment."""

    def reset(self, **kwargs: Any) -> str | None:
        self.count = kwargs.get("start", 0)
        return f" Count from {self.count}."

    def increment(self, step: int) -> int:
        """
        Adds to the count.

        Args:
            step: How much.

        Returns:
            The count.
        """
        self.count += step
        return self.count

    def get_reward(self) -> float:
        return float(self.count)


@dataclass(frozen=True)
class Play:
    """What the policy says in its turns; a turn is text, or calls as (name, arguments)."""

    name: str
    turns: list[Any]
    with_environment: bool = False
    limit: int = LIMIT
    differs: str | None = None
    """Why ours differs on purpose."""


PLAYS = [
    Play("no call", ["It is 17."]),
    Play("one call", [[("add", {"a": 8, "b": 9})], "It is 17."]),
    Play("calls in three turns", [[("add", {"a": 1, "b": n})] for n in range(3)] + ["Done."]),
    Play("a number that is no integer", [[("divide", {"a": 1, "b": 3})], "It is a third."]),
    Play("a dict", [[("look_up", {"word": 'ünï "quoted"'})], "I see."]),
    Play("a tool that fails", [[("divide", {"a": 1, "b": 0})], "It cannot be divided."]),
    Play("async", [[("ask", {"question": "Is it"})], "Yes."]),
    Play("words and a call", [("I add.", [("add", {"a": 8, "b": 9})]), "17."]),
    Play("two calls in a turn", [[("add", {"a": 1, "b": 2}), ("look_up", {"word": "known"})], "3, and known."]),
    Play(
        "async before sync",
        [[("ask", {"question": "Is it"}), ("add", {"a": 1, "b": 2})], "3."],
        differs="results come in the order of the calls; TRL puts those of async tools behind the others",
    ),
    Play(
        "no such tool",
        [[("subtract", {"a": 8, "b": 9})], "Sorry."],
        differs="the model is told which tools there are; TRL says only `Tool subtract not found.`",
    ),
    Play(
        "an argument is missing",
        [[("add", {"a": 8})], "Sorry."],
        differs="the model is told the parameters; TRL hands on the message of Python's TypeError",
    ),
    Play(
        "white space at the end",
        [[("add", {"a": 8, "b": 9})], "It is 17.\n"],
        differs="the message says what was said; TRL's schema strips it",
    ),
    Play("an environment", [[("increment", {"step": 2})], [("increment", {"step": 3})], "5."], True),
    Play("environment and tool", [[("increment", {"step": 2})], [("add", {"a": 2, "b": 2})], "4."], True),
    Play("an answer that does not fit", [[("add", {"a": 8, "b": 9})], "It is 17."], limit=50),
    Play("a turn that is cut off", [[("add", {"a": 8, "b": 9})], "It is " + "17, really, " * 40], limit=110),
]
TEMPLATES = ("qwen2_5", "llama3_1")


def turn_text(template: str, turn: Any) -> str:
    """A turn as a model of this template writes it, without its end token."""
    if isinstance(turn, str):
        return turn
    words, calls = turn if isinstance(turn, tuple) else ("", turn)
    if template == "llama3_1":
        ((name, arguments),) = calls
        return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)
    written = [
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
        for name, arguments in calls
    ]
    return "\n".join([*([words] if words else []), *written])


def plays_of(template: str) -> list[Play]:
    """Those that the template can show: Llama's has one call a turn, and no words beside it."""
    if template != "llama3_1":
        return PLAYS
    return [play for play in PLAYS if all(isinstance(turn, str) or _is_one_call(turn) for turn in play.turns)]


def _is_one_call(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 1


def setting_of(template: str, play: Play) -> str:
    """Names what its prompt depends on."""
    return f"{template} with an environment" if play.with_environment else template
