"""What is said of a run on a terminal: neither control characters nor Rich's markup act on it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from grpo_cli.record.metrics import Metrics

SHOWN_CHARACTERS = 300
"""Of a prompt's end and a completion's start in a table."""

LINE_METRICS = {
    "reward": "reward",
    "kl": "kl",
    "completions/mean_length": "length",
    "loss": "loss",
    "grad_norm": "grad",
    "entropy": "entropy",
    "eval_reward": "eval reward",
    "train/skipped_steps": "skipped optimizer steps",
}
"""Metric to its name on the screen, in this order, where a step has it."""

UNUSUAL = {"train/skipped_steps"}
"""Of these, those that are shown only where they are not 0."""


def step_line(metrics: Metrics) -> str:
    """`reward -81.2  length 23.5  …`."""
    shown = {name: value for name, value in metrics.items() if value or name not in UNUSUAL}
    return "  ".join(f"{label} {shown[name]:.4g}" for name, label in LINE_METRICS.items() if name in shown)


def ending(content: str | list[dict[str, Any]]) -> str:
    """The last characters of a prompt, where its question usually is, safe to print."""
    text = content if isinstance(content, str) else str(content[-1]["content"])
    return printable(text if len(text) <= SHOWN_CHARACTERS else "…" + text[-SHOWN_CHARACTERS:])


def beginning(text: str) -> str:
    """The first characters of a completion, safe to print."""
    return printable(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")


def as_call(name: str, arguments: Mapping[str, Any]) -> str:
    """`add(a=1, b=2)`."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def printable(text: str) -> str:
    """Text in which neither control characters nor Rich's markup act on the terminal."""
    return escape(visible(text))


def visible(text: str) -> str:
    """Text without control characters, which Rich's markup still acts on: for a Rich `Text`.

    Every kind of space but a line break is shown as one: not every terminal knows them.
    """
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
