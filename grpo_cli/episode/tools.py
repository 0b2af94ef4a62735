"""Tools that the policy may call: Python functions, and what a chat template is told of each.

No torch: `grpo check` shows tools as the model will see them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_type_hints

from grpo_cli.errors import UserError, one_line


@dataclass(frozen=True)
class Tool:
    """A function that the policy may call."""

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]
    """`{"type": "function", "function": {"name", "description", "parameters"}}`, as chat templates take it."""
    is_async: bool

    @property
    def properties(self) -> dict[str, dict[str, Any]]:
        """JSON schema of each parameter, by name."""
        found: dict[str, dict[str, Any]] = self.schema["function"]["parameters"]["properties"]
        return found

    @property
    def required(self) -> list[str]:
        """Parameters without a default value."""
        names: list[str] = self.schema["function"]["parameters"].get("required", [])
        return names


def tool_of(function: Callable[..., Any], where: str) -> Tool:
    """The tool that a function is, described by its type hints and its Google docstring.

    The schema is that of transformers' `get_json_schema`, so prompts are those that `apply_chat_template` makes of
    the function itself.

    Args:
        function: a function or method, bound or not, `async` or not.
        where: what named it, for messages: `episode.tools.0`.

    Raises:
        UserError: it is no function, a parameter cannot be given by name, or a type or a description is missing.
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise UserError(f"{where}: {function!r} is not a function; a tool is written with def or async def")
    name = function.__name__
    parameters = _parameters(function)
    for parameter in parameters:
        if fault := _fault_of_parameter(parameter):
            raise UserError(f"{where}: {name}: {fault}")
    if fault := _fault_of_docstring(function, parameters):
        raise UserError(f"{where}: {name}: {fault}")
    try:
        schema = _json_schema(function)
    except Exception as error:  # annotations are code of the user's, and raise what they like
        raise UserError(f"{where}: {name}: {_fault_of_types(function, error)}") from error
    return Tool(name, function, schema, inspect.iscoroutinefunction(function))


def by_name(tools: Iterable[Tool], where: str) -> dict[str, Tool]:
    """Tools by the name under which the policy calls them.

    Raises:
        UserError: two have the same name.
    """
    named: dict[str, Tool] = {}
    for tool in tools:
        if tool.name in named:
            raise UserError(f"{where}: two tools are called {tool.name}; rename one, its name is how it is called")
        named[tool.name] = tool
    return named


def wrong_arguments(tool: Tool, arguments: dict[str, Any]) -> str | None:
    """What to tell the model about arguments with which the tool cannot be called; None if it can.

    Names are checked, since Python would refuse the call. Of types only what JSON tells apart at sight: an object
    or a list where the schema has neither, or something else where it has one of them. A string that is iterated
    as if it were a list raises nothing, and the model would be told nonsense. Within a plain value nothing is
    checked: TRL hands `"7"` or `7.0` to an `int`, and many tools cope. Nor is null, with which models fill in what
    they leave out.
    """
    unknown = [name for name in arguments if name not in tool.properties]
    if unknown:
        return f"{tool.name} has no parameter {_quoted(unknown)}; {_all_parameters(tool)}"
    missing = [name for name in tool.required if name not in arguments]
    if missing:
        return f"{tool.name} needs {_quoted(missing)}; {_all_parameters(tool)}"
    for name, value in arguments.items():
        declared = json_types(tool.properties[name])
        if value is not None and declared and _kind(value) not in {_KINDS.get(one, "value") for one in declared}:
            given = {"object": "an object", "array": "a list"}.get(_kind(value), type(value).__name__)
            return f"{tool.name}: '{name}' must be of type {' or '.join(declared)}, not {given}"
    return None


_KINDS = {"object": "object", "array": "array"}
"""What JSON tells apart at sight; every other type is a plain value."""


def _kind(value: Any) -> str:
    return "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "value"


def json_types(schema: dict[str, Any]) -> list[str]:
    """The JSON types that a parameter's schema names; none if it takes anything."""
    declared = schema.get("type", [])
    types = [declared] if isinstance(declared, str) else list(declared)
    for choice in schema.get("anyOf", []):
        inner = json_types(choice)
        if not inner:
            return []
        types += inner
    return types


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name[:50]}'" for name in names)


def _all_parameters(tool: Tool) -> str:
    """`its parameters are a (integer), b (integer, optional)`."""
    listed = [
        name + f" ({' or '.join(json_types(schema)) or 'anything'}{'' if name in tool.required else ', optional'})"
        for name, schema in tool.properties.items()
    ]
    return f"its parameters are {', '.join(listed)}" if listed else "it takes no parameters"


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those that a call names: without the receiver of a method that is not bound."""
    parameters = list(inspect.signature(function).parameters.values())
    first = parameters[0] if parameters else None
    if first and first.name in {"self", "cls"} and first.annotation is inspect.Parameter.empty:
        return parameters[1:]
    return parameters


def _fault_of_parameter(parameter: inspect.Parameter) -> str | None:
    if parameter.kind in {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        stars = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "**"
        return f"the model cannot give {stars}{parameter.name}; write each parameter by its name"
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        return f"the model gives '{parameter.name}' by its name; remove the / from the signature"
    if parameter.annotation is inspect.Parameter.empty:
        return f"parameter '{parameter.name}' has no type; write one, such as {parameter.name}: int"
    return None


def _fault_of_docstring(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> str | None:
    docstring = (inspect.getdoc(function) or "").strip()
    if not docstring:
        return "it has no docstring; write what it does, and below `Args:` a line for each parameter"
    description, described, _ = _library().parse_google_format_docstring(docstring)
    if not description:
        return "its docstring does not begin with what the tool does; write that above `Args:`"
    for parameter in parameters:
        if not (described or {}).get(parameter.name):
            line = f"`{parameter.name}: what it is`"
            return (
                f"parameter '{parameter.name}' has no description; write {line}, without its type, below `Args:` "
                "in the docstring"
            )
    return None


def _fault_of_types(function: Callable[..., Any], error: Exception) -> str:
    """Whose type it is for which there is no JSON schema, if it is one's."""
    try:
        hints = get_type_hints(function)
    except Exception as unknown:  # a hint may be any expression
        return f"its types cannot be read: {one_line(unknown)}"
    for name, hint in hints.items():
        try:
            _json_schema(_taking(hint))
        except Exception:  # as above
            whose = "what it returns" if name == "return" else f"parameter '{name}'"
            return (
                f"the type of {whose}, {hint}, has no JSON schema; write str, int, float, bool, list[...], "
                "dict[str, ...], Literal[...] or a union of such types"
            )
    return one_line(error)


def _taking(hint: Any) -> Callable[..., Any]:
    """A tool with one parameter, of that type."""

    def tool(value: Any) -> None:
        """A tool.

        Args:
            value: a value.
        """

    tool.__annotations__ = {"value": hint}
    return tool


def _json_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """As transformers has it, which imports torch to ask whether a hint is a tensor: unloaded, it cannot be."""
    library = _library()
    asked = library.is_torch_available
    if "torch" not in sys.modules:
        library.is_torch_available = lambda: False
    try:
        schema: dict[str, Any] = library.get_json_schema(function)
    finally:
        library.is_torch_available = asked
    return schema


def _library() -> Any:
    """Imported where there are tools: half a second that no other recipe waits for."""
    from transformers.utils import chat_template_utils

    return chat_template_utils
