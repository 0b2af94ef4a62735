"""How models write tool calls: a pure function for each format, from the text of a turn to the calls in it.

Which format a model was taught is read off its chat template, which shows it. No function here raises, whatever
the text is: what is wrong with a call is part of it, to be told to the model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DEEPEST = 50
"""Lists and objects within each other that arguments may have: further on, templates and files fail on them."""


@dataclass(frozen=True)
class WrittenCall:
    """A tool call as the model wrote it."""

    start: int
    end: int
    """Its place in the turn's text."""
    name: str | None
    arguments: dict[str, Any] | None
    fault: str | None = None
    """Why it cannot be read, and then name or arguments may be None."""
    id: str | None = None
    """If the model wrote one."""
    as_text: bool = False
    """Whether the arguments are text whose types only the tool's schema knows."""


@dataclass(frozen=True)
class CallFormat:
    """A way of writing tool calls."""

    name: str
    calls: Callable[[str], list[WrittenCall]]
    """Those in a turn's text, special tokens included, in their order."""
    is_of: Callable[[str], bool]
    """Whether a chat template shows calls like this."""
    example: str
    """What is told to a model that did not manage it."""


def format_of(chat_template: str) -> CallFormat | None:
    """The format in which a chat template shows tool calls; None if it is none that is known here."""
    return next((form for form in FORMATS if form.is_of(chat_template)), None)


def hermes_calls(text: str) -> list[WrittenCall]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Qwen 2.5 and 3, Hermes and SmolLM3 write it.

    The last one may lack its end. Nothing but the object may stand in between.
    """
    calls: list[WrittenCall] = []
    start = text.find("<tool_call>")
    while start >= 0:
        body = start + len("<tool_call>")
        value, after, fault = read_json(text, body)
        closing = re.compile(r"\s*(</tool_call>|(?=<tool_call>)|$)").match(text, after) if not fault else None
        if closing is None:
            closing = re.compile(r"</tool_call>|(?=<tool_call>)|\Z").search(text, body)
            assert closing is not None  # the end of the text is one
            fault = fault or f"something other than </tool_call> follows its JSON: {excerpt(text, after)}"
        calls.append(_call(value, start, closing.end(), fault, text))
        start = text.find("<tool_call>", closing.end())
    return calls


def xml_calls(text: str) -> list[WrittenCall]:
    """`<tool_call><function=f><parameter=key>value</parameter></function></tool_call>`, as Qwen 3.5 writes it."""
    calls: list[WrittenCall] = []
    for found in re.finditer(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", text, re.DOTALL):
        function = re.match(r"<function=([^>\n]+)>", found[1].lstrip())
        if function is None:
            fault = "<function=name> does not follow <tool_call>"
            calls.append(WrittenCall(*found.span(), None, None, fault))
            continue
        body = found[1].strip()[function.end() :].removesuffix("</function>")
        arguments: dict[str, Any] = {}
        before, *parts = body.split("<parameter=")
        fault = f"{excerpt(before.strip(), 0)} is no parameter" if before.strip() else ""
        for part in parts:
            key, opened, rest = part.partition(">")
            value, closed, after = rest.partition("</parameter>")
            if not opened or not closed or after.strip():
                fault = f"<parameter=name>value</parameter> is not what {excerpt('<parameter=' + part, 0)} is"
            arguments[key.strip()] = value.removeprefix("\n").removesuffix("\n")
        calls.append(WrittenCall(*found.span(), function[1].strip(), arguments, fault or None, as_text=True))
    return calls


def llama_calls(text: str) -> list[WrittenCall]:
    """`{"name": ..., "parameters": {...}}`, `<|python_tag|>` before it or not, as Llama 3 writes it.

    An object without parameters is part of an answer, unless the tag says that it is a call.
    """
    calls: list[WrittenCall] = []
    pattern = re.compile(r'<\|python_tag\|>|\{\s*"(?:name|parameters|arguments)"\s*:')
    found = pattern.search(text)
    while found is not None:
        start, body = found.start(), found.start()
        tagged = found[0] == "<|python_tag|>"
        if tagged:
            body = found.end()
        value, end, fault = read_json(text, body)
        if fault:
            later = pattern.search(text, found.end())
            end = later.start() if later else len(text)
        if tagged or (_says_parameters(text[body:end]) if fault else {"parameters", "arguments"} & value.keys()):
            if calls and not text[calls[-1].end : start].strip(" \n;,"):
                start = calls[-1].end
            calls.append(_call(value, start, end, fault, text))
        found = pattern.search(text, max(end, found.end()))
    return calls


def _says_parameters(text: str) -> bool:
    return re.search(r'"(?:parameters|arguments)"\s*:', text) is not None


def mistral_calls(text: str) -> list[WrittenCall]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` of a newer one."""
    calls: list[WrittenCall] = []
    for found in re.finditer(r"\[TOOL_CALLS\]\s*", text):
        start, body = found.span()
        named = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?").match(text, body)
        value, end, fault = read_json(text, named.end() if named else body)
        if fault:
            end = text.find("[TOOL_CALLS]", body)
            end = len(text) if end < 0 else end
        if named:
            value = {"name": named[1], "arguments": {} if fault else value, "id": named[2]}
        several = value if isinstance(value, list) and not fault else [value]
        if not several:
            calls.append(WrittenCall(start, end, None, None, "the list of calls is empty"))
        calls += [_call(one, start, end, fault, text) for one in several]
    return calls


FORMATS = (
    CallFormat(
        "mistral",
        mistral_calls,
        lambda template: "[TOOL_CALLS]" in template,
        '[TOOL_CALLS][{"name": "...", "arguments": {...}}]',
    ),
    CallFormat(
        "xml",
        xml_calls,
        lambda template: "<function=" in template and "<parameter=" in template,
        "<tool_call><function=...><parameter=...>...</parameter></function></tool_call>",
    ),
    CallFormat(
        "hermes",
        hermes_calls,
        lambda template: "<tool_call>" in template and "<arg_key>" not in template,  # which is GLM's
        '<tool_call>{"name": "...", "arguments": {...}}</tool_call>',
    ),
    CallFormat(
        "llama",
        llama_calls,
        lambda template: "ipython" in template and '"parameters": ' in template,  # the role of results
        '{"name": "...", "parameters": {...}}',
    ),
)


def read_json(text: str, start: int) -> tuple[Any, int, str | None]:
    """The JSON value at `start`, where it ends, and what is wrong if there is none; then it ends as it began."""
    blank = _BLANK.match(text, start)
    start = blank.end() if blank else start
    try:
        value, end = _DECODER.raw_decode(text, start)
        return usable(value), end, None
    except json.JSONDecodeError as error:
        return None, start, f"it is not valid JSON ({error.msg} at {excerpt(text, error.pos)})"
    except (ValueError, RecursionError) as error:
        return None, start, f"its JSON cannot be used ({error})"


def excerpt(text: str, start: int, length: int = 30) -> str:
    """A few characters of a text, for a message."""
    part = text[start : start + length]
    return repr(part) if part else "its end"


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_BLANK = re.compile(r"\s*")
_DECODER = json.JSONDecoder(parse_constant=_refuse)


def usable(value: Any, depth: int = DEEPEST) -> Any:
    """The same value, in text that can be written: JSON can spell half a pair of surrogates.

    Raises:
        ValueError: it is nested too deeply, or a number is too large.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    if isinstance(value, dict | list) and not depth:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        return {usable(key, depth): usable(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [usable(inner, depth - 1) for inner in value]
    return value


def _call(value: Any, start: int, end: int, fault: str | None, text: str) -> WrittenCall:
    """The call that a JSON value describes; or, where there is no value, what can be seen of one."""
    if fault and not isinstance(value, dict):
        seen = re.search(r'"name"\s*:\s*"([\w.-]{1,100})"', text[start:end])
        return WrittenCall(start, end, seen[1] if seen else None, None, fault)
    if not isinstance(value, dict):
        return WrittenCall(start, end, None, None, "it is not a JSON object")
    name = value.get("name")
    given = [value[key] for key in ("arguments", "parameters") if value.get(key) is not None]
    arguments: Any = given[0] if given else {}
    if not isinstance(name, str) or not name:
        name, fault = None, fault or "it has no name"
    if not isinstance(arguments, dict):
        arguments, fault = None, fault or "its arguments are not a JSON object"
    written_id = value.get("id")
    return WrittenCall(start, end, name, arguments, fault, written_id if isinstance(written_id, str) else None)
