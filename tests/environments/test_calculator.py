"""The calculator is right, says what it cannot do, and does nothing but arithmetic whatever a model writes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from environments.calculator import calculate, questions
from grpo_cli.episode.tools import tool_of
from rewards.boxed import boxed_answer


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1 + 2 * 3", "7"),
        ("(3 + 4) * 12 / 5", "16.8"),
        ("6 / 2", "3"),
        ("0.1 + 0.2", "0.3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ** 0.5", "1.41421356237"),
        ("2 ** -2", "0.25"),
        ("2 ** 200", str(2**200)),
        ("10 ** 400 / 3", "3.33333333333E+399"),
        ("1 / 3", "0.333333333333"),
        ("6 × 7 ÷ 2 − 1", "20"),
        ("+(1_000)", "1000"),
        (" 1.5e3 ", "1500"),
    ],
)
def test_arithmetic(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("2 ^ 3", "^ is not an operator here; write ** for powers"),
        ("9 ** 9 ** 9 ** 9", "too large"),
        ("2 ** 0.5 ** 0.5 ** -9999", "too large"),
        ("1" * 2000, "has 2000 characters, more than 1000"),
        ("(" * 900, "not an arithmetic expression"),
        ("-" * 999 + "1", "not an arithmetic expression"),
        ("1 +", "not an arithmetic expression: 1 +"),
        ("", "not an arithmetic expression"),
        ("__import__('os').system('true')", "only numbers, + - * / // % ** and parentheses"),
        ("[1] * 10 ** 9", "only numbers"),
        ("'a' * 10", "only numbers"),
        ("True + 1", "only numbers"),
        ("2j * 2", "only numbers"),
        ("1e999", "a number is too large"),
        ("(-8) ** (1 / 3)", "a root of a negative number"),
        ("1 < 2", "only numbers"),
        ("1,000 + 1", "only numbers"),
    ],
)
def test_what_it_cannot_calculate_it_says(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        calculate(expression)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789.+-*/%() eE_", max_size=60))
def test_whatever_is_written_ends_in_a_number_or_a_value_error(expression: str) -> None:
    try:
        result = calculate(expression)
    except ValueError:
        return
    assert re.fullmatch(r"-?[0-9.]+(E[+-][0-9]+)?", result)


def test_it_is_a_tool() -> None:
    assert list(tool_of(calculate, "here").properties) == ["expression"]


def test_questions_are_those_of_their_seed_and_their_answers_are_right() -> None:
    rows = questions(size=50, seed=3, terms=4)
    assert rows == questions(size=50, seed=3, terms=4)
    assert rows != questions(size=50, seed=4, terms=4)
    for row in rows:
        expression = row["prompt"].removeprefix("What is ").removesuffix("?")
        assert re.fullmatch(r"[0-9+\-* ()]+", expression)
        assert row["ground_truth"] == str(eval(expression))
        assert boxed_answer(
            completions=[f"\\boxed{{{row['ground_truth']}}}"], ground_truth=[row["ground_truth"]]
        ) == [1.0]
    with pytest.raises(ValueError, match="terms of 2 or more"):
        questions(terms=1)
