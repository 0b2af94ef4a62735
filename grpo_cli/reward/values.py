"""Checks what a reward function returned: one finite number or None per completion. No torch import."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set, Sized
from itertools import islice
from numbers import Complex, Real
from typing import Any

import numpy as np

SAMPLE_CHARACTERS = 200


class Unusable(Exception):
    """What a function returned is not one number or None per completion."""

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index


def checked_values(result: Any, count: int) -> list[float]:
    """One float per completion, NaN for None.

    Raises:
        Unusable: it is something else.
    """
    wanted = "a list with one number or None per completion"
    if result is None or isinstance(result, str | bytes | bytearray | Mapping | Set):
        kind = "None" if result is None else f"a {type(result).__name__}"
        raise Unusable(f"returned {kind} instead of {wanted}")
    # One copy for a whole tensor, where reading entry by entry would wait for the GPU each time.
    values = result.tolist() if hasattr(result, "tolist") else result
    try:
        iter(values)
    except TypeError:
        raise Unusable(f"returned a {type(result).__name__} instead of {wanted}") from None
    listed = as_many(values, count, "returned")
    return [math.nan if value is None else _number(value, index) for index, value in enumerate(listed)]


def as_many(values: Iterable[Any], count: int, verb: str) -> list[Any]:
    """The values as a list of `count`; there may be no end of them.

    Raises:
        Unusable: `<verb> 3 values for 4 completions`.
    """
    listed = list(islice(values, count + 1))
    if len(listed) == count:
        return listed
    if isinstance(values, Sized):
        number = str(len(values))
    else:
        number = f"{len(listed)} or more" if len(listed) > count else str(len(listed))
    raise Unusable(f"{verb} {number} values for {count} completions")


def is_real(value: Any) -> bool:
    """Whether a value is one real number, of whatever library."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__") or tuple(getattr(value, "shape", ())):
        return False
    if isinstance(value, Complex) and not isinstance(value, Real):
        return False
    return not isinstance(value, np.generic) or value.dtype.kind in "biuf"


def _number(value: Any, index: int) -> float:
    """A finite real number as a float; anything else is Unusable."""
    if not is_real(value):
        shape = tuple(getattr(value, "shape", ()))
        kind = f"a {type(value).__name__}" + (f" of shape {shape}" if shape else "")
        raise Unusable(f"value {index} is {kind}, not a number: {shortened(value)}", index)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Unusable(f"value {index} is not a number: {error}", index) from error
    if math.isnan(number):
        raise Unusable(f"value {index} is nan; return None for 'does not apply'", index)
    if math.isinf(number):
        raise Unusable(f"value {index} is {number}, not a finite number", index)
    return number


def shortened(value: Any) -> str:
    """`repr`, with the middle left out where it is long."""
    text = repr(value)
    if len(text) <= SAMPLE_CHARACTERS:
        return text
    half = SAMPLE_CHARACTERS // 2 - 2
    return f"{text[:half]} … {text[-half:]}"
