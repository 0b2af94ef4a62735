"""The errors that a user sees: one readable message each, and the exit code that goes with it."""

from __future__ import annotations


def one_line(error: BaseException, limit: int = 500) -> str:
    """The first `limit` characters of what an error says, without line breaks; its type if it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


class UserError(Exception):
    """The recipe, the command line or an input file is wrong. The CLI prints it and exits with 2."""


class RunError(Exception):
    """The run failed for a reason that a message explains better than a traceback. Exit code 1."""


class ServerLost(RunError):
    """A rollout server stays away: training ends with a checkpoint, as `StoppedEarly`."""


class ServerNeverReached(ServerLost):
    """A rollout server has not answered once."""


class StoppedEarly(Exception):
    """The run ended before its last step with a checkpoint, so a scheduler may requeue it. Exit code 75."""


EXPECTED_ERRORS = (UserError, RunError, StoppedEarly)
"""Errors whose message alone tells the user what happened: no traceback is shown."""
