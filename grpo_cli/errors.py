"""The errors that a user sees: one readable message each, and the exit code that goes with it."""

from __future__ import annotations


class UserError(Exception):
    """The recipe, the command line or an input file is wrong. The CLI prints it and exits with 2."""


class RunError(Exception):
    """The run failed for a reason that a message explains better than a traceback. Exit code 1."""


class StoppedBySignal(Exception):
    """A signal ended the run after its checkpoint was written. Exit code 75, so a scheduler requeues it."""
