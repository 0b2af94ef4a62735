"""An error that travels as a value is raised where the result is asked for; others are raised at once."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_cli.distributed.outcome import outcome_of, result_of
from grpo_cli.errors import EXPECTED_ERRORS, RunError, ServerLost, StoppedEarly, UserError


def failing(error: Exception) -> Any:
    raise error


def test_a_value_is_its_own_outcome() -> None:
    for value in (None, 0, "text", [RunError("in a list")]):
        assert result_of(outcome_of(lambda value=value: value)) is value  # type: ignore[misc]


@pytest.mark.parametrize("error", [UserError("u"), RunError("r"), ServerLost("l"), StoppedEarly("s")], ids=repr)
def test_an_expected_error_waits_until_the_result_is_asked_for(error: Exception) -> None:
    outcome = outcome_of(lambda: failing(error))
    with pytest.raises(EXPECTED_ERRORS) as caught:
        result_of(outcome)
    assert caught.value is error


def test_any_other_error_is_raised_at_once_unless_it_was_named() -> None:
    with pytest.raises(KeyError):
        outcome_of(lambda: failing(KeyError("k")))
    outcome = outcome_of(lambda: failing(KeyError("k")), (Exception,))
    with pytest.raises(KeyError):
        result_of(outcome)
