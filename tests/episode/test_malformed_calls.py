"""A thousand malformed tool calls, made at random: none raises, and each gets an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.episode.call_formats import FORMATS, format_of
from grpo_cli.episode.calls import ParsedTurn, TurnParser
from tests.episode.chat import chat_tokenizer, template_text
from tests.episode.test_calls import TOOLS

TEMPLATES = {"hermes": "qwen3", "xml": "qwen3_5", "llama": "llama3_1", "mistral": "mistral"}
TOKENIZERS = {form: chat_tokenizer(name) for form, name in TEMPLATES.items()}
PARSERS = {form: TurnParser(tokenizer) for form, tokenizer in TOKENIZERS.items()}

NAMES = ["add", "find", "sub", "", " add", "add()", 'a"dd', "\n", "é", "x" * 200, None, 3]
VALUES = [
    0,
    -1.5,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "7",
    'say "no"',
    "</tool_call>",
    "\ud800",
    [],
    {},
    {"a": 1},
]
VALUES += [[1, "x"], [[[]]], {"a": {"b": [None]}}, "\x00", 10**30]
PARAMETERS = ["a", "b", "text", "flags", "c", ""]
OPENINGS = {"hermes": "<tool_call>", "xml": "<tool_call>", "llama": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
MARKS = [
    *OPENINGS.values(),
    "</tool_call>",
    "<function=",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    "[ARGS]",
]
MARKS += ["<think>", "</think>", "<|im_end|>", '{"name": ', *'[]{}",;\\']


def hermes(name: Any, given: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': given})}\n</tool_call>"


def xml(name: Any, given: Any) -> str:
    pairs = given.items() if isinstance(given, dict) else [("a", given)]
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in pairs)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def llama(name: Any, given: Any) -> str:
    return f"<|python_tag|>{json.dumps({'name': name, 'parameters': given})}"


def mistral(name: Any, given: Any) -> str:
    if isinstance(name, str):
        return f"[TOOL_CALLS]{name}[ARGS]{json.dumps(given)}"
    return f"[TOOL_CALLS][{json.dumps({'name': name, 'arguments': given})}]"


WRITERS: dict[str, Callable[[Any, Any], str]] = {"hermes": hermes, "xml": xml, "llama": llama, "mistral": mistral}


def any_arguments(draw: st.DrawFn) -> Any:
    if draw(st.booleans()):
        return draw(st.sampled_from(VALUES))
    return {
        draw(st.sampled_from(PARAMETERS)): draw(st.sampled_from(VALUES)) for _ in range(draw(st.integers(0, 3)))
    }


@st.composite
def malformed(draw: st.DrawFn) -> tuple[str, str]:
    """A format and a turn in it: a call as it should be written but for its values, then cut, torn or mixed up."""
    form = draw(st.sampled_from(list(WRITERS)))
    text = WRITERS[form](draw(st.sampled_from(NAMES)), any_arguments(draw))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(len(OPENINGS[form]), len(text)))  # it stays a call
        text = text[:start] + draw(st.sampled_from(MARKS)) + text[start + draw(st.integers(0, 12)) :]
    return form, text


def parse(form: str, text: str) -> ParsedTurn:
    ids = TOKENIZERS[form](text.encode("utf-8", "replace").decode(), add_special_tokens=False)["input_ids"]
    return PARSERS[form].parse(ids, TOOLS, prefix=[])


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(malformed())
def test_no_malformed_call_raises_and_each_gets_an_answer(turn: tuple[str, str]) -> None:
    form, text = turn
    parsed = parse(form, text)
    assert parsed.calls
    assert isinstance(parsed.message["content"], str)
    for call in parsed.calls:
        if call.error is None:
            assert set(call.arguments) <= set(TOOLS[call.name].properties)
            assert set(TOOLS[call.name].required) <= set(call.arguments)
        else:
            assert 0 < len(call.error) < 1000
            call.error.encode()
    json.dumps(parsed.message, allow_nan=False).encode()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(TOKENIZERS)), st.lists(st.integers(0, 680), max_size=40))
def test_no_tokens_at_all_raise(form: str, ids: list[int]) -> None:
    parsed = PARSERS[form].parse(ids, TOOLS, prefix=ids)
    assert all(call.error for call in parsed.calls)
    json.dumps(parsed.message).encode()


def test_every_format_has_a_template_and_a_writer_here() -> None:
    assert set(WRITERS) == set(TEMPLATES) == {form.name for form in FORMATS}
    for form, name in TEMPLATES.items():
        found = format_of(template_text(name))
        assert found is not None
        assert found.name == form
