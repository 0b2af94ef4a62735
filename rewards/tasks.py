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
from rewards.sandbox import check_sandbox, run_tests
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
    sandbox: str = "auto",
    **_: object,
) -> list[float | None]:
    """Reward programs where the task is "code": +1.0 if all tests pass, -1.0 if not; None for other tasks.

    The program is the last fenced code block marked as Python; without one the last unmarked block; without
    any block the whole completion. It runs first, then the tests, which use its names as if they stood in the
    same file. Passing means that the last line of the tests was reached and their interpreter then ended
    without an error.

    Needs the dataset columns `task` and, for the rows of this task, `tests`: Python with assert statements,
    one string or a list of them.

    Program and tests run in two child processes with limits (`rewards.sandbox`: 6 s, 512 MiB each; a few rows
    at a time), each in a world of its own where bubblewrap works. Values cross between them as data, so an
    object that says to be equal to everything is equal to nothing, and a program that ends early, prints what
    a passing run prints or redefines `all` does not pass. The other side of it: tests must not subclass,
    inspect or patch what the program defines, nor give it anything but data and functions, and `==` and `in`
    do not ask the program, unless both sides of `==` are its objects (`rewards.sandbox_remote`).

    Args:
        completions: what the model wrote.
        task: the rows' tasks.
        tests: the rows' tests.
        sandbox: `required` refuses to start where bubblewrap does not work; `auto` then warns, and code runs as
            your user with limits only.

    Raises:
        ValueError: a row of this task has no tests, a column has another length than `completions`, or
            `sandbox` is `required` and bubblewrap does not work.
        TypeError: a completion is neither a string nor a list of messages.
        RuntimeError: a child process could not start.
    """
    rows = _rows_of("code", task, completions)
    its_tests = _values("tests", tests, "code", rows, len(completions))
    programs = [python_block(completion_text(completions[row])) for row in rows]
    parts = [_test_parts(row, row_tests) for row, row_tests in zip(rows, its_tests, strict=True)]
    if rows:
        check_sandbox(sandbox)
    # Not one per core of a large node: the children compete with the trainer for it.
    with ThreadPoolExecutor(max_workers=min(8, max(2, usable_cores()))) as pool:
        results = list(pool.map(run_tests, programs, parts))
    return _spread(rows, [result.passed for result in results], len(completions))


def _check_coding_params(sandbox: str = "auto", **_: object) -> None:
    check_sandbox(sandbox)


coding_reward.check_params = _check_coding_params  # type: ignore[attr-defined]


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
