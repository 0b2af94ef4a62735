"""From the tokens of a turn to what it says: the message, and the tool calls in it.

Whatever the model wrote, this answers. A call that is wrong carries what to tell the model about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_cli.episode.call_formats import CallFormat, WrittenCall, format_of, read_json, usable
from grpo_cli.episode.tools import Tool, json_types, wrong_arguments

NO_NAME = "unknown"
"""Name of a call in which none can be read, as TRL has it."""

_PREFIX_TOKENS = 512
"""Of what comes before a turn, as many tokens tell how the template began it; no episode is decoded whole."""

_MARKS = {
    *("<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    *("<tool_call>", "</tool_call>", "<think>", "</think>"),
}
"""Special tokens by which calls and thoughts are found; the others are no part of what a turn says."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made."""

    name: str
    arguments: dict[str, Any]
    id: str | None
    """For the answer's `tool_call_id`; None where the chat template reads none."""
    error: str | None
    """What is wrong with it, told to the model as its result; None if it may be called."""


@dataclass(frozen=True)
class ParsedTurn:
    """What a turn says."""

    message: dict[str, Any]
    """In transformers' chat format: role, content, and if there are any reasoning_content and tool_calls. A call
    that could not be read stays in the content, as it was written."""
    calls: list[ToolCall]
    """In the order in which they were made."""


def result_text(value: Any) -> str:
    """What the model is told that a tool returned: `str(value)`, as TRL has it, for lists too.

    Half a pair of surrogates, which no tokenizer takes, becomes a question mark.
    """
    return str(value).encode("utf-8", "replace").decode()


class TurnParser:
    """Reads turns by the tokenizer's own response template if it has one, else as its chat template shows calls.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: of which the format is read; if None, the tokenizer's.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        if chat_template is None:
            chat_template = tokenizer.get_chat_template(tools=[]) if tokenizer.chat_template is not None else ""
        self._tokenizer = tokenizer
        self._format: CallFormat | None = format_of(chat_template)
        self._by_response_template = getattr(tokenizer, "response_template", None) is not None
        self._takes_reasoning = "reasoning_content" in chat_template
        self._takes_ids = re.search(r"call_id\b|tool_call(\.|\[['\"])id\b", chat_template) is not None
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {tokenizer.eos_token} if tokenizer.eos_token else set()
        self._special = _any_of(special)
        self._noise = _any_of(special - _MARKS)

    def why_no_calls(self) -> str | None:
        """What to do if it is not known how this model writes calls; None if it is."""
        if self._by_response_template or self._format is not None:
            return None
        return (
            "it is not known how this model writes tool calls: its chat template shows none of the formats of "
            "Qwen, Llama and Mistral; set model.chat_template to one that does, or model.tokenizer to a tokenizer "
            "with a response_template"
        )

    def parse(self, token_ids: Sequence[int], tools: Mapping[str, Tool], *, prefix: Sequence[int]) -> ParsedTurn:
        """What a turn says. Never raises.

        Args:
            token_ids: what was sampled, the end token included.
            tools: those that may be called, by name. Without any, a turn has no calls.
            prefix: all tokens before the turn.
        """
        ids, before = list(token_ids), list(prefix)
        if self._by_response_template:
            try:
                return self._by_tokenizer(ids, tools, before)
            except Exception as error:  # a broken call ends in whatever the template's parsers raise
                if tools and self._format is None:
                    plain = {"role": "assistant", "content": self._plain(ids)}
                    call = ToolCall(NO_NAME, {}, self._id(before, 0), _unreadable(str(error), None, tools))
                    return ParsedTurn(plain, [call])
        return self._by_format(ids, tools, before)

    def _by_format(self, ids: list[int], tools: Mapping[str, Tool], before: list[int]) -> ParsedTurn:
        text = self._noise.sub("", self._tokenizer.decode(ids, skip_special_tokens=False))
        begun = self._tokenizer.decode(before[-16:]).rstrip().endswith("<think>")
        thoughts, rest = _split_thoughts(text, begun)
        written = self._format.calls(text[rest:]) if tools and self._format else []
        message: dict[str, Any] = {"role": "assistant"}
        if not written and (thoughts is None or not self._takes_reasoning):
            return ParsedTurn(message | {"content": self._plain(ids)}, [])
        content = self._special.sub("", _besides(text[rest:], written)).strip()
        if thoughts is not None and self._takes_reasoning:
            inside = self._special.sub("", thoughts).strip()
            message |= {"reasoning_content": inside} if inside else {}
        elif thoughts is not None:
            content = f"{text[:rest].strip()}\n\n{content}".rstrip()
        message["content"] = content
        calls = [self._call(one, place, tools, before) for place, one in enumerate(written)]
        readable = [call for call, one in zip(calls, written, strict=True) if not one.fault]
        return ParsedTurn(message | _listed(readable), calls)

    def _by_tokenizer(self, ids: list[int], tools: Mapping[str, Tool], before: list[int]) -> ParsedTurn:
        schemas = [tool.schema for tool in tools.values()]
        parsed = self._tokenizer.parse_response(ids, prefix=before[-_PREFIX_TOKENS:], tools=schemas)
        found = parsed.pop("tool_calls", None) or []
        content = parsed.get("content") or ""
        message = parsed | {"role": "assistant", "content": self._special.sub("", content)}
        if not tools:
            return ParsedTurn(message, [])
        written = [_written(entry) for entry in (found if isinstance(found, list) else [found])]
        calls = [self._call(one, place, tools, before) for place, one in enumerate(written)]
        readable = [call for call, one in zip(calls, written, strict=True) if not one.fault]
        return ParsedTurn(message | _listed(readable), calls)

    def _call(self, written: WrittenCall, place: int, tools: Mapping[str, Tool], before: list[int]) -> ToolCall:
        name, arguments = written.name or NO_NAME, written.arguments or {}
        call_id = written.id if self._takes_ids and _is_id(written.id) else self._id(before, place)
        error = _unreadable(written.fault, self._format, tools) if written.fault else None
        tool = tools.get(name)
        if error is None and tool is None:
            error = f"there is no tool {name[:100]!r}; {_names(tools)}"
        if error is None and tool is not None:
            if written.as_text:
                arguments = _typed(arguments, tool)
            error = wrong_arguments(tool, arguments)
        return ToolCall(name, arguments, call_id, error)

    def _id(self, before: list[int], place: int) -> str | None:
        """Nine letters and digits, as Mistral wants them: where the turn begins, and the call's place in it."""
        return f"{len(before) & 0xFFFFF:05x}{place & 0xFFFF:04x}" if self._takes_ids else None

    def _plain(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _split_thoughts(text: str, begun: bool) -> tuple[str | None, int]:
    """The thoughts with which a turn begins, and where they end; a call that they mention is none.

    Args:
        text: of the turn.
        begun: whether the prompt ends in `<think>`.
    """
    opening = re.match(r"\s*<think>", text)
    if opening is None and not begun:
        return None, 0
    start = opening.end() if opening else 0
    end = text.find("</think>", start)
    return (text[start:], len(text)) if end < 0 else (text[start:end], end + len("</think>"))


def _besides(text: str, written: Sequence[WrittenCall]) -> str:
    """What a turn says besides the calls that could be read."""
    faulty = {(call.start, call.end) for call in written if call.fault}
    parts, place = [], 0
    for start, end in dict.fromkeys((call.start, call.end) for call in written):  # those of one list share a place
        if (start, end) not in faulty:
            parts.append(text[place:start])
            place = end
    return "".join([*parts, text[place:]])


def _listed(calls: Sequence[ToolCall]) -> dict[str, Any]:
    """The message's entry for calls, as chat templates take it."""
    entries = [
        {"type": "function"}
        | ({} if call.id is None else {"id": call.id})
        | {"function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return {"tool_calls": entries} if entries else {}


def _written(entry: Any) -> WrittenCall:
    """A call as `parse_response` gives it."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict):
        return WrittenCall(0, 0, None, None, "it is not a JSON object")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        return WrittenCall(0, 0, None, None, "it has no name")
    if arguments is not None and not isinstance(arguments, dict):
        return WrittenCall(0, 0, name, None, "its arguments are not a JSON object")
    try:
        return WrittenCall(0, 0, name, usable(arguments or {}), id=entry.get("id"))
    except ValueError as error:
        return WrittenCall(0, 0, name, None, str(error))


def _typed(arguments: dict[str, Any], tool: Tool) -> dict[str, Any]:
    """Arguments that were written as text, as what they spell unless the schema says that they are text."""
    typed = dict(arguments)
    for name, text in arguments.items():
        types = json_types(tool.properties.get(name, {}))
        if types and "string" not in types:
            spelled = {"True": "true", "False": "false", "None": "null"}.get(text, text)
            value, end, fault = read_json(spelled, 0)
            if not fault and not spelled[end:].strip():
                typed[name] = value
    return typed


def _is_id(written: Any) -> bool:
    return isinstance(written, str) and re.fullmatch(r"[A-Za-z0-9]{9}", written) is not None


def _unreadable(fault: str, form: CallFormat | None, tools: Mapping[str, Tool]) -> str:
    how = f"; write {form.example}" if form else ""
    return f"the tool call cannot be read: {' '.join(fault.split())[:300]}{how}; {_names(tools)}"


def _names(tools: Mapping[str, Tool]) -> str:
    return f"the tools are {', '.join(tools)}" if len(tools) > 1 else f"the only tool is {next(iter(tools))}"
