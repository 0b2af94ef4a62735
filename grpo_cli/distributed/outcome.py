"""What work gave, or the error that it raised, as a value for the ranks or threads that wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from grpo_cli.errors import EXPECTED_ERRORS

T = TypeVar("T")


def outcome_of(work: Callable[[], T], errors: tuple[type[Exception], ...] = EXPECTED_ERRORS) -> T | Exception:
    """What `work` returns, which is no exception, or which of `errors` it raises."""
    try:
        return work()
    except errors as error:
        return error


def result_of(outcome: T | Exception) -> T:
    """What the work returned; what it raised is raised here."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
