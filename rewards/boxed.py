r"""A reward for the final answer in `\boxed{...}`, compared as text.

Quick and predictable; `rewards.tasks:math_reward` is the one that knows that 1/2 is 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.text import Completion, completion_text

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT_WRAPPER = re.compile(r"\\text\s*\{([^{}]*)\}")
_GROUPED_NUMBER = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?")


def boxed_answer(
    completions: Sequence[Completion], ground_truth: Sequence[object], **_: object
) -> list[float | None]:
    r"""Reward a right final answer: 1.0 where the last box holds the ground truth, else 0.0.

    Needs the dataset column `ground_truth`: the bare answer, or a GSM8K solution that ends in
    `#### answer`. Where it is None, so is the reward. See `last_boxed` for what counts as the box, and
    `normalise_answer` for the differences that are forgiven. An empty box is never right.

    Raises:
        TypeError: a completion is neither a string nor a list of messages.
        ValueError: `ground_truth` has another length than `completions`.
    """
    if len(ground_truth) != len(completions):
        raise ValueError(
            f"column 'ground_truth' has {len(ground_truth)} entries for {len(completions)} completions"
        )
    return [
        None if truth is None else float(_is_right(completion_text(completion), truth_answer(truth)))
        for completion, truth in zip(completions, ground_truth, strict=True)
    ]


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` or `\fbox{...}` of a text holds; None without one.

    The last box is the one that opens last. If it is never closed there is no answer, even if an earlier
    box was: a completion cut off in its final answer has not given it. Inner braces are matched; `\{` and
    `\}` are not braces.
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:position]
        position += 1
    return None


def truth_answer(ground_truth: object) -> str:
    """Return the answer that a ground truth states: what follows its last `####`, or all of it."""
    return str(ground_truth).rpartition("####")[2].strip()


def normalise_answer(answer: str) -> str:
    r"""Return an answer in the form in which answers are compared.

    Forgiven: surrounding white space and `$`, a full stop at the end, one `\text{...}` around everything,
    `\dfrac` and `\tfrac` for `\frac`, white space that separates no two letters or digits, and in a number
    the commas between thousands, a plus sign, and zeros that change nothing (`072.0` is `72`).
    """
    previous = None
    while answer != previous:
        previous = answer
        answer = answer.strip().removeprefix("\\$").removesuffix("\\$").strip("$").strip().removesuffix(".")
        if wrapper := _TEXT_WRAPPER.fullmatch(answer):
            answer = wrapper[1]
    answer = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", answer)
    answer = re.sub(r"\s+", " ", answer)
    answer = re.sub(r"(?<![^\W_]) | (?![^\W_])", "", answer)
    plain_commas = answer.replace("{,}", ",")
    if _GROUPED_NUMBER.fullmatch(plain_commas):
        answer = plain_commas.replace(",", "")
    return _normalise_number(answer)


def _normalise_number(answer: str) -> str:
    # On the digits themselves: a float, or a Decimal in its default context, would make long numbers equal.
    match = _NUMBER.fullmatch(answer)
    if not match or not (match[2] or match[3]):
        return answer
    sign, whole, fraction = match[1], match[2].lstrip("0"), (match[3] or "").rstrip("0")
    number = (whole or "0") + ("." + fraction if fraction else "")
    return "-" + number if sign == "-" and number != "0" else number


def _is_right(text: str, truth: str) -> bool:
    box = last_boxed(text)
    if box is None:
        return False
    answer = normalise_answer(box)
    return answer != "" and answer == normalise_answer(truth)
