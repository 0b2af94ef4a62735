"""What an error says fits into a message."""

from __future__ import annotations

import pytest

from grpo_cli.errors import one_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one\n  two\tthree"), "one two three"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
        (ValueError("x" * 600), "x" * 500),
    ],
)
def test_an_error_is_told_in_one_line(error: Exception, expected: str) -> None:
    assert one_line(error) == expected


def test_the_line_is_as_long_as_there_is_room() -> None:
    assert one_line(ValueError("one two"), 3) == "one"
