"""Functions become tools as the model is told of them, and what is missing is an error that says what to write."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
from transformers.utils import get_json_schema

from grpo_cli.episode.tools import by_name, tool_of, wrong_arguments
from grpo_cli.errors import UserError


def multiply(a: int, b: int = 2) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer,
            which may be left out.

    Returns:
        The product.
    """
    return a * b


async def fetch(
    topics: list[str], how: Literal["fast", "slow"] | None = None, options: dict[str, int] | None = None
):  # type: ignore[no-untyped-def]
    """Fetches pages.

    Args:
        topics: What they are about.
        how: How to fetch them.
        options: Anything (choices: ["a", "b"])
    """


def anything(value: Any, either: int | list[int] | None) -> None:
    """Takes anything.

    Args:
        value: A value.
        either: One number or several.
    """


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, amount: int) -> str:
        """Adds to the counter.

        Args:
            amount: How much.
        """
        self.count += amount
        return str(self.count)

    async def wait(self) -> None:
        """Waits."""


@pytest.mark.parametrize("function", [multiply, fetch, anything, Counter.add, Counter().add, Counter.wait])
def test_a_tool_is_described_as_transformers_describes_the_function(function: Callable[..., Any]) -> None:
    tool = tool_of(function, "tools.0")
    assert tool.schema == get_json_schema(function)
    assert (tool.name, tool.function) == (function.__name__, function)
    assert tool.is_async == (function.__name__ in {"fetch", "wait"})


def test_a_bound_method_is_called_on_its_object() -> None:
    counter = Counter()
    tool = tool_of(counter.add, "tools.0")
    assert list(tool.properties) == tool.required == ["amount"]
    assert (tool.function(amount=2), tool.function(amount=3)) == ("2", "5")


def no_docstring(a: int) -> int:
    return a


def no_type(a) -> int:  # type: ignore[no-untyped-def]
    """Does.

    Args:
        a: It.
    """


def no_description(a: int, b: int) -> int:
    """Does.

    Args:
        a: It.
    """
    return a + b


def typed_docstring(a: int) -> int:
    """Does.

    Args:
        a (int): It.
    """
    return a


def only_arguments(a: int) -> int:
    """
    Args:
        a: It.
    """
    return a


def stars(*numbers: int) -> int:
    """Does.

    Args:
        numbers: All.
    """
    return 0


def more(**options: int) -> int:
    """Does.

    Args:
        options: All.
    """
    return 0


def positional(a: int, /) -> int:
    """Does.

    Args:
        a: It.
    """
    return a


def no_schema(a: int, call: Callable[[int], int]) -> int:
    """Does.

    Args:
        a: It.
        call: What.
    """
    return call(a)


def undefined(a: Missing) -> int:  # type: ignore[name-defined]  # noqa: F821
    """Does.

    Args:
        a: It.
    """
    return 0


def odd_result(a: int) -> tuple[str, ...]:
    """Does.

    Args:
        a: It.
    """
    return ()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_docstring, "no_docstring: it has no docstring; write what it does, and below `Args:` a line for each"),
        (no_type, "no_type: parameter 'a' has no type; write one, such as a: int"),
        (no_description, "no_description: parameter 'b' has no description; write `b: what it is`"),
        (
            typed_docstring,
            "parameter 'a' has no description; write `a: what it is`, without its type, below `Args:`",
        ),
        (only_arguments, "only_arguments: its docstring does not begin with what the tool does"),
        (stars, "stars: the model cannot give *numbers; write each parameter by its name"),
        (more, "more: the model cannot give **options; write each parameter by its name"),
        (positional, "positional: the model gives 'a' by its name; remove the / from the signature"),
        (
            no_schema,
            "no_schema: the type of parameter 'call', collections.abc.Callable[[int], int], has no JSON schema",
        ),
        (undefined, "undefined: its types cannot be read: name 'Missing' is not defined"),
        (odd_result, "odd_result: the type of what it returns, tuple[str, ...], has no JSON schema"),
        (Counter, "<class 'tests.episode.test_tools.Counter'> is not a function"),
        (len, "<built-in function len> is not a function"),
        (7, "7 is not a function; a tool is written with def or async def"),
    ],
)
def test_what_a_function_lacks_to_be_a_tool_is_an_error_that_says_what_to_write(
    function: Any, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as failure:
        tool_of(function, "episode.tools.0")
    assert str(failure.value).startswith("episode.tools.0: ")


def test_two_tools_of_one_name_are_an_error() -> None:
    tool = tool_of(multiply, "tools.0")
    assert by_name([tool], "episode.tools") == {"multiply": tool}
    with pytest.raises(UserError, match=r"episode\.tools: two tools are called multiply; rename one"):
        by_name([tool, tool], "episode.tools")


@pytest.mark.parametrize(
    ("function", "arguments", "told"),
    [
        (multiply, {"a": 1}, None),
        (multiply, {"a": 1, "b": 2}, None),
        # TRL hands these on, and so do we: the tool may cope, and else says itself what is wrong.
        (multiply, {"a": "7", "b": 7.5}, None),
        (multiply, {"a": None}, None),
        (multiply, {}, "multiply needs 'a'; its parameters are a (integer), b (integer, optional)"),
        (
            multiply,
            {"a": 1, "c": 2},
            "multiply has no parameter 'c'; its parameters are a (integer), b (integer, optional)",
        ),
        (multiply, {"a": [1]}, "multiply: 'a' must be of type integer, not a list"),
        (multiply, {"a": {}}, "multiply: 'a' must be of type integer, not an object"),
        (fetch, {"topics": ["x"], "how": "fast", "options": {}}, None),
        (fetch, {"topics": "x"}, "fetch: 'topics' must be of type array, not str"),
        (fetch, {"topics": [], "options": 3}, "fetch: 'options' must be of type object, not int"),
        (anything, {"value": {"a": [1]}, "either": 1}, None),
        (anything, {"value": 1, "either": [1]}, None),
        (
            anything,
            {"value": 1, "either": {}},
            "anything: 'either' must be of type integer or array, not an object",
        ),
        (Counter.wait, {"s": 1}, "wait has no parameter 's'; it takes no parameters"),
    ],
)
def test_the_model_is_told_of_arguments_with_which_a_call_would_make_no_sense(
    function: Callable[..., Any], arguments: dict[str, Any], told: str | None
) -> None:
    assert wrong_arguments(tool_of(function, "tools.0"), arguments) == told


def test_tools_are_described_without_torch() -> None:
    code = (
        "import sys\n"
        "from grpo_cli.episode.tools import tool_of\n"
        "assert 'transformers' not in sys.modules\n"
        "def add(a: int, b: float | None = None) -> int:\n"
        "    '''Adds.\n\n    Args:\n        a: One.\n        b: Two.\n    '''\n"
        "assert tool_of(add, 'tools.0').properties['a'] == {'type': 'integer', 'description': 'One.'}\n"
        "assert 'torch' not in sys.modules\n"
        "from transformers.utils import is_torch_available\n"
        "assert is_torch_available()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
