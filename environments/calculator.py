"""A calculator as a tool, and questions that need one.

Expressions come from a model, so nothing of Python is evaluated but numbers and arithmetic, and no result may take
long or much memory.
"""

from __future__ import annotations

import ast
import decimal
import math
import operator
import random
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 1000
MAX_BITS = 4096
"""Of the numerator or denominator of any result on the way: some 1,200 digits."""

_OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: lambda a, b: _power(a, b),
}


def calculate(expression: str) -> str:
    """
    Calculate an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as "(3 + 4) * 12 / 5".

    Returns:
        The result: exact if it is a whole number, else with 12 digits.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(expression)} characters, more than {MAX_CHARACTERS}")
    try:
        parsed = ast.parse(expression.strip().translate({0xD7: "*", 0xF7: "/", 0x2212: "-"}), mode="eval")
        return _shown(_value(parsed.body))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, MemoryError, RecursionError):  # thousands of parentheses
        raise ValueError(f"not an arithmetic expression: {expression[:100]}") from None


def questions(size: int = 500, seed: int = 0, terms: int = 3, largest: int = 99) -> list[dict[str, str]]:
    """Arithmetic questions whose answers are whole numbers.

    Args:
        size: number of rows.
        seed: of the random numbers; the same seed makes the same rows.
        terms: numbers in each question, at least two.
        largest: the largest of them.

    Returns:
        Rows with `prompt` and `ground_truth`.

    Raises:
        ValueError: fewer than two terms, or no number between 1 and `largest`.
    """
    if terms < 2 or largest < 1:
        raise ValueError(f"needs terms of 2 or more and largest of 1 or more, not {terms} and {largest}")
    numbers = random.Random(seed)
    rows = []
    for _ in range(size):
        expression = str(numbers.randint(1, largest))
        for place in range(terms - 1):
            expression = f"{expression} {numbers.choice('+-*')} {numbers.randint(1, largest)}"
            if place < terms - 2 and numbers.random() < 0.5:
                expression = f"({expression})"
        rows.append({"prompt": f"What is {expression}?", "ground_truth": calculate(expression)})
    return rows


def _value(node: ast.AST) -> Fraction:
    """The value of a part of an expression; ValueError for what is no arithmetic."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number is too large")
            return _bounded(Fraction(value) if isinstance(value, int) else Fraction(repr(value)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(left), _value(right)))
        case ast.BinOp(op=ast.BitXor()):
            raise ValueError("^ is not an operator here; write ** for powers")
    raise ValueError("only numbers, + - * / // % ** and parentheses can be calculated")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator)
        if bits > 2 * MAX_BITS and abs(base) != 1:
            raise ValueError("the result is too large")
        return Fraction(base ** int(exponent))
    if base < 0:
        raise ValueError("a root of a negative number")
    try:
        result = float(base) ** float(exponent)
    except (OverflowError, ValueError):
        raise ValueError("the result is too large") from None
    if base and not result:
        raise ValueError("the result is too small")
    return Fraction(repr(result))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("the result is too large")
    return value


def _shown(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    with decimal.localcontext(prec=12):
        return str(decimal.Decimal(value.numerator) / decimal.Decimal(value.denominator))
