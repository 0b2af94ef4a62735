"""The Python tool says what a program printed and how it ended, and its questions have right answers."""

from __future__ import annotations

import math

import pytest

from environments import python_tool
from environments.python_tool import questions, run_python
from grpo_cli.episode.tools import tool_of


def test_what_a_program_prints_and_how_it_ends_is_told() -> None:
    assert run_python("print(6 * 7)") == "42"
    assert run_python("x = 1") == "[it printed nothing]"
    failed = run_python("print('before')\n1 / 0")
    assert failed.startswith("before\n")
    assert "ZeroDivisionError: division by zero" in failed
    assert failed.endswith("[ended with exit code 1]")
    assert "SyntaxError" in run_python("print(")


def test_nothing_is_kept_from_the_last_run() -> None:
    run_python("x = 1")
    assert "NameError" in run_python("print(x)")


def test_a_program_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_tool, "TIMEOUT_S", 1.0)
    assert run_python("print('on my way', flush=True)\nwhile True: pass") == "on my way\n[ended after 1 seconds]"


def test_it_is_a_tool() -> None:
    tool = tool_of(run_python, "here")
    assert list(tool.properties) == ["code"]
    assert "Each run is a new one" in tool.schema["function"]["description"]


def test_questions_are_those_of_their_seed_and_their_answers_are_right() -> None:
    rows = questions(size=100, seed=1)
    assert rows == questions(size=100, seed=1)
    assert rows != questions(size=100, seed=2)
    kinds = {row["prompt"].partition(" n")[0].partition(" 1")[0][:20] for row in rows}
    assert len(kinds) >= 3
    assert python_tool._question  # the four kinds below are those that it draws from
    for row in rows:
        words = row["prompt"].rstrip("?").split()
        numbers = [int(word) for word in words if word.isdigit()]
        match words:
            case ["What", "is", "the", "sum", "of", "all", "prime", *_]:
                sieve = [n for n in range(2, numbers[0]) if not any(n % d == 0 for d in range(2, n))]
                assert row["ground_truth"] == str(sum(sieve))
            case ["How", "many", "zeros", *_]:
                assert row["ground_truth"] == str(str(math.factorial(numbers[0])).count("0"))
            case ["How", "many", "whole", *_]:
                _, last, other, _ = numbers
                assert row["ground_truth"] == str(len([i for i in range(1, last + 1) if math.gcd(i, other) == 1]))
            case _:
                assert row["ground_truth"] == str(sum(int(digit) for digit in str(numbers[0] ** numbers[1])))
