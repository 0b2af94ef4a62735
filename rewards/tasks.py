"""Rewards for datasets that mix tasks: each scores the rows of its own task and says None to the others.

Both want a verdict that the model cannot talk its way around, and both get it from a child process, because
what a model writes may never end.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rewards.boxed import truth_answer
from rewards.math_judge import shared_judge, usable_cores
from rewards.sandbox import run_python
from rewards.text import Completion, completion_text

T = TypeVar("T")

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+.-]*)")
_PYTHON = {"python", "python3", "py"}


def math_reward(
    completions: Sequence[Completion],
    task: Sequence[object],
    ground_truth: Sequence[object] | None = None,
    **_: object,
) -> list[float | None]:
    r"""Reward right answers where the task is "math": +1.0 if right, -1.0 if not; None for other tasks.

    math-verify finds the answer in the completion (the boxed one before others, the last before earlier
    ones; several boxes are a set, so that guessing does not pay) and judges whether it equals the ground
    truth: `0.5`, `1/2` and `\frac{1}{2}` are equal. No answer that it can parse is -1.0.

    Needs the dataset columns `task` and, for the rows of this task, `ground_truth`: the answer, bare or as
    LaTeX, or a GSM8K solution that ends in `#### answer`.

    Works from any thread and does not hang: math-verify runs in up to 4 child processes, and an answer that
    one cannot decide in 5 seconds (`9^{9^{9^9}}`) or in 2 GiB is -1.0. Only the last 8,000 characters are
    read. See `rewards.math_judge` for the figures behind this.

    Raises:
        ValueError: a row of this task has no ground truth, or a column has another length than `completions`.
        TypeError: a completion is neither a string nor a list of messages.
        ImportError: math-verify is not installed.
        RuntimeError: a child process could not start.
    """
    rows = _rows_of("math", task, completions)
    truths = _values("ground_truth", ground_truth, "math", rows, len(completions))
    texts = [completion_text(completions[row]) for row in rows]
    pairs = [(truth_answer(truth), text) for truth, text in zip(truths, texts, strict=True)]
    for row, (truth, _text) in zip(rows, pairs, strict=True):
        if not truth:
            raise ValueError(f"row {row} has task 'math' but an empty ground_truth")
    return _spread(rows, shared_judge.judge(pairs), len(completions))


def coding_reward(
    completions: Sequence[Completion],
    task: Sequence[object],
    tests: Sequence[str | Sequence[str] | None] | None = None,
    **_: object,
) -> list[float | None]:
    """Reward programs where the task is "code": +1.0 if all tests pass, -1.0 if not; None for other tasks.

    The program is the last fenced code block marked as Python; without one the last unmarked block; without
    any block the whole completion. It runs first, then the tests, in one namespace. Passing means that the
    last line of the tests was reached and the interpreter then ended without an error.

    Needs the dataset columns `task` and, for the rows of this task, `tests`: Python with assert statements,
    one string or a list of them.

    Everything runs in a child process with limits (`rewards.sandbox`: 6 s, 512 MiB; a few rows at a time).
    That the end was reached is told over a separate pipe with a random token that stands neither in the
    program's files nor in its environment. So `sys.exit(0)`, `os._exit(0)`, printing what a passing run
    prints, and unclosed quotes that would swallow the tests are all -1.0. But program and tests share a
    process: code that searches the frames of its callers for the token, or returns objects that are equal
    to everything, can still pass. It is a guard against what a policy stumbles on, not a boundary against
    code that sets out to cheat.

    Raises:
        ValueError: a row of this task has no tests, or a column has another length than `completions`.
        TypeError: a completion is neither a string nor a list of messages.
        RuntimeError: a child process could not start.
    """
    rows = _rows_of("code", task, completions)
    its_tests = _values("tests", tests, "code", rows, len(completions))
    programs = [
        [python_block(completion_text(completions[row])), *_test_parts(row, row_tests)]
        for row, row_tests in zip(rows, its_tests, strict=True)
    ]
    # Not one per core of a large node: the children compete with the trainer for it.
    with ThreadPoolExecutor(max_workers=min(8, max(2, usable_cores()))) as pool:
        passed = list(pool.map(lambda parts: run_python(parts).passed, programs))
    return _spread(rows, passed, len(completions))


def python_block(text: str) -> str:
    """Return the last Python block of a Markdown text, else its last unmarked block, else the text itself.

    A block that is never closed reaches to the end: the completion may have been cut off after the code.
    """
    marked: str | None = None
    unmarked: str | None = None
    lines = text.split("\n")
    position = 0
    while position < len(lines):
        opening = _FENCE.match(lines[position])
        position += 1
        if not opening:
            continue
        start = position
        while position < len(lines) and not _closes(lines[position], opening[1]):
            position += 1
        # Blocks in a list are indented with it.
        code = textwrap.dedent("\n".join(lines[start:position]))
        position += 1
        if opening[2].lower() in _PYTHON:
            marked = code
        elif not opening[2]:
            unmarked = code
    return next((code for code in (marked, unmarked) if code is not None), text)


def _closes(line: str, fence: str) -> bool:
    stripped = line.strip()
    return len(stripped) >= len(fence) and set(stripped) == {fence[0]}


def _rows_of(name: str, task: Sequence[object], completions: Sequence[Completion]) -> list[int]:
    if len(task) != len(completions):
        raise ValueError(f"column 'task' has {len(task)} entries for {len(completions)} completions")
    return [row for row, its_task in enumerate(task) if its_task == name]


def _values(name: str, column: Sequence[T | None] | None, task: str, rows: list[int], length: int) -> list[T]:
    """Return the entries of a column for these rows, none of them None."""
    if not rows:
        return []
    if column is None:
        raise ValueError(f"the rows with task {task!r} need the dataset column {name!r}, which the dataset lacks")
    if len(column) != length:
        raise ValueError(f"column {name!r} has {len(column)} entries for {length} completions")
    values = [value for row in rows if (value := column[row]) is not None]
    if len(values) != len(rows):
        missing = next(row for row in rows if column[row] is None)
        raise ValueError(f"row {missing} has task {task!r} but no {name} (it is None)")
    return values


def _test_parts(row: int, tests: str | Sequence[str]) -> list[str]:
    parts = [tests] if isinstance(tests, str) else list(tests)
    # Without a test every program that runs would be right.
    if not any(part.strip() for part in parts):
        raise ValueError(f"row {row} has task 'code' but empty tests")
    return parts


def _spread(rows: list[int], verdicts: Sequence[bool], length: int) -> list[float | None]:
    rewards: list[float | None] = [None] * length
    for row, right in zip(rows, verdicts, strict=True):
        rewards[row] = 1.0 if right else -1.0
    return rewards
