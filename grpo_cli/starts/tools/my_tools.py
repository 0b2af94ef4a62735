"""Tools of this experiment, and the questions that need them.

A tool's name, types and docstring are what the model is told of it. Calls come from a model: a tool must bear any
arguments of these types, and an exception is told to the model.
"""

import random
from typing import Literal

LARGEST = 1e15
"""Whole numbers up to here are exact in floating point."""


def calculate(left: float, operation: Literal["+", "-", "*", "/"], right: float) -> str:
    """
    Calculate with two numbers.

    Args:
        left: The first number.
        operation: What to do with them.
        right: The second number.

    Returns:
        The result.
    """
    match operation:
        case "+":
            result = left + right
        case "-":
            result = left - right
        case "*":
            result = left * right
        case "/":
            if right == 0:
                raise ValueError("division by zero")
            result = left / right
        case _:
            raise ValueError(f"there is no operation {operation}; there are + - * /")
    if not abs(result) <= LARGEST:  # nor is NaN, of infinities
        raise ValueError("the result is too large")
    return f"{result:.12g}" if result % 1 else str(int(result))


def questions(size: int, seed: int) -> list[dict[str, str]]:
    """Rows with `prompt` and `ground_truth`: two steps, of which the first has to be known for the second."""
    numbers = random.Random(seed)
    rows = []
    for _ in range(size):
        boxes, pieces, taken = numbers.randint(12, 99), numbers.randint(112, 999), numbers.randint(13, 999)
        prompt = f"{boxes} boxes hold {pieces} screws each, and {taken} screws are taken out. How many are left?"
        rows.append({"prompt": prompt, "ground_truth": str(boxes * pieces - taken)})
    return rows
