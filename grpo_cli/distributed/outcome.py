"""What work gave, or the error that it raised, as a value for the ranks or threads that wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from grpo_cli.errors import RunError, StoppedEarly, UserError

EXPECTED_ERRORS = (UserError, RunError, StoppedEarly)
"""What ranks tell each other. Any other is a bug: the rank that has it ends, and the launcher ends the rest."""

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
