"""What a turn says becomes a message and tool calls, whatever the model wrote."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from grpo_cli.episode.calls import ParsedTurn, ToolCall, TurnParser, result_text
from grpo_cli.episode.tools import Tool, tool_of
from tests.conftest import byte_tokenizer
from tests.episode.chat import chat_tokenizer, template_text
from tests.episode.record_trl import TURNS_FILE, prompt_ids

QWEN, XML, LLAMA, MISTRAL = "qwen2_5", "qwen3_5", "llama3_1", "mistral"


def add(a: int, b: int = 0) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def find(text: str, flags: list[str] | None = None, exact: bool = False) -> str:
    """Finds a text.

    Args:
        text: What.
        flags: How.
        exact: Whether every letter counts.
    """
    return text


TOOLS = {function.__name__: tool_of(function, "tools") for function in (add, find)}


def parsed(
    name: str, text: str, tools: dict[str, Tool] = TOOLS, prefix: str = "", tokenizer: Any = None
) -> ParsedTurn:
    tokenizer = tokenizer or chat_tokenizer(name)
    ids, before = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, prefix))
    return TurnParser(tokenizer).parse(ids, tools, prefix=before)


def said(content: str, *calls: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    entries = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return {"role": "assistant", "content": content} | more | ({"tool_calls": entries} if calls else {})


ADD = ("add", {"a": 8, "b": 9})
FIND = ("find", {"text": "</tool_call> {x}", "flags": ["i"]})
ADD_JSON = '{"name": "add", "arguments": {"a": 8, "b": 9}}'
FIND_JSON = '{"name": "find", "arguments": {"text": "</tool_call> {x}", "flags": ["i"]}}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (QWEN, f"<tool_call>\n{ADD_JSON}\n</tool_call><|im_end|>", said("", ADD)),
        (QWEN, f"I add.\n\n<tool_call>{ADD_JSON}</tool_call><|im_end|>", said("I add.", ADD)),
        (
            QWEN,
            f"<tool_call>\n{ADD_JSON}\n</tool_call>\n<tool_call>\n{FIND_JSON}\n</tool_call><|im_end|>",
            said("", ADD, FIND),
        ),
        (QWEN, f"<tool_call>\n{ADD_JSON}<tool_call>{FIND_JSON}", said("", ADD, FIND)),  # ends left out
        (QWEN, '<tool_call>{"name": "add", "parameters": {"a": 8, "b": 9}}</tool_call>', said("", ADD)),
        (
            XML,
            "<tool_call>\n<function=add>\n<parameter=a>\n8\n</parameter>\n<parameter=b>\n9\n</parameter>\n"
            "</function>\n</tool_call><|im_end|>",
            said("", ADD),
        ),
        (
            XML,
            "So.\n<tool_call><function=find><parameter=text>\n12\n\n</parameter><parameter=flags>\n"
            '["i"]\n</parameter><parameter=exact>True</parameter></function></tool_call>',
            said("So.", ("find", {"text": "12\n", "flags": ["i"], "exact": True})),
        ),
        (LLAMA, '{"name": "add", "parameters": {"a": 8, "b": 9}}<|eot_id|>', said("", ADD)),
        (LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 8, "b": 9}}<|eom_id|>', said("", ADD)),
        (LLAMA, f"Let me add. {ADD_JSON}; {FIND_JSON}<|eot_id|>", said("Let me add.", ADD, FIND)),
        (MISTRAL, f"[TOOL_CALLS][{ADD_JSON}]</s>", said("", ADD)),
        (MISTRAL, f"[TOOL_CALLS] [{ADD_JSON}, {FIND_JSON}]</s>", said("", ADD, FIND)),
        (MISTRAL, f"Well. [TOOL_CALLS]{ADD_JSON}</s>", said("Well.", ADD)),
        (
            MISTRAL,
            '[TOOL_CALLS]add[ARGS]{"a": 8, "b": 9}[TOOL_CALLS]find[ARGS]{"text": "x"}</s>',
            said("", ADD, ("find", {"text": "x"})),
        ),
    ],
)
def test_calls_are_read_in_the_format_that_the_template_shows(
    name: str, text: str, message: dict[str, Any]
) -> None:
    turn = parsed(name, text)
    for entry in turn.message.get("tool_calls", []):
        assert (entry.pop("id", None) is None) == (name != MISTRAL)
    assert turn.message == message
    expected = [
        (entry["function"]["name"], entry["function"]["arguments"], None) for entry in message["tool_calls"]
    ]
    assert [(call.name, call.arguments, call.error) for call in turn.calls] == expected


@pytest.mark.parametrize("name", [QWEN, XML, LLAMA, MISTRAL])
@pytest.mark.parametrize(
    "text", ["It is 17.", '{"answer": 17}', '{"name": "Ada", "age": 36}', "  \n17  \n", "a <|im_start|> b", ""]
)
def test_an_answer_stays_as_it_was_decoded(name: str, text: str) -> None:
    tokenizer = chat_tokenizer(name)
    ids = tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    turn = TurnParser(tokenizer).parse(ids, TOOLS, prefix=[])
    assert turn == ParsedTurn(said(tokenizer.decode(ids, skip_special_tokens=True)), [])


def test_without_tools_a_turn_has_no_calls() -> None:
    text = f"<tool_call>{ADD_JSON}</tool_call>"
    assert parsed(QWEN, text, tools={}) == ParsedTurn(said(text), [])


READ = "the tool call cannot be read: "
HERMES = '; write <tool_call>{"name": "...", "arguments": {...}}</tool_call>; the tools are add, find'


@pytest.mark.parametrize(
    ("name", "text", "call_name", "error"),
    [
        (
            QWEN,
            '<tool_call>{"name": "add", "arguments": {"a": 8}</tool_call>',
            "add",
            READ + "it is not valid JSON",
        ),
        (QWEN, "<tool_call></tool_call>", "unknown", READ + "it is not valid JSON (Expecting value at"),
        (QWEN, "<tool_call>", "unknown", f"{READ}it is not valid JSON (Expecting value at its end){HERMES}"),
        (QWEN, f"<tool_call>{ADD_JSON}}}</tool_call>", "add", READ + "something other than </tool_call> follows"),
        (QWEN, "<tool_call>[1]</tool_call>", "unknown", READ + "it is not a JSON object" + HERMES),
        (QWEN, '<tool_call>{"arguments": {}}</tool_call>', "unknown", READ + "it has no name" + HERMES),
        (QWEN, '<tool_call>{"name": 3}</tool_call>', "unknown", READ + "it has no name" + HERMES),
        (QWEN, '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>', "add", READ + "its arguments are not"),
        (
            QWEN,
            '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
            "add",
            "NaN is not a JSON number",
        ),
        (
            QWEN,
            '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>',
            "add",
            "a number is too large",
        ),
        (QWEN, f'<tool_call>{{"name": "add", "arguments": {"[" * 90}', "add", "it is not valid JSON"),
        (QWEN, f'<tool_call>{{"name": "add", "arguments": {"[" * 90}{"]" * 90}}}', "add", "nested too deeply"),
        (QWEN, f"<tool_call>{'[' * 99_999}", "unknown", "cannot be used"),
        (QWEN, '<tool_call>{"name": "sub"}</tool_call>', "sub", "there is no tool 'sub'; the tools are add, find"),
        (
            QWEN,
            '<tool_call>{"name": "add"}</tool_call>',
            "add",
            "add needs 'a'; its parameters are a (integer), b",
        ),
        (
            QWEN,
            '<tool_call>{"name": "add", "arguments": {"a": 1, "c": 2}}</tool_call>',
            "add",
            "add has no parameter 'c'; its parameters are a (integer), b (integer, optional)",
        ),
        (XML, "<tool_call>add(8, 9)</tool_call>", "unknown", "<function=name> does not follow <tool_call>"),
        (XML, "<tool_call><function=add>8</function></tool_call>", "add", "'8' is no parameter"),
        (XML, "<tool_call><function=add><parameter=a>8</function></tool_call>", "add", "<parameter=name>value"),
        (LLAMA, '{"name": "add", "parameters": {"a": 8', "add", READ + "it is not valid JSON"),
        (LLAMA, "<|python_tag|>print(8 + 9)", "unknown", READ + "it is not valid JSON"),
        (LLAMA, '{"parameters": {"a": 8}}', "unknown", READ + "it has no name"),
        (LLAMA, '{"name": "add", "parameters": [8, 9]}', "add", READ + "its arguments are not a JSON object"),
        (MISTRAL, "[TOOL_CALLS]", "unknown", READ + "it is not valid JSON"),
        (MISTRAL, "[TOOL_CALLS][]", "unknown", READ + "the list of calls is empty"),
        (MISTRAL, f"[TOOL_CALLS][{ADD_JSON}", "add", READ + "it is not valid JSON"),
        (MISTRAL, "[TOOL_CALLS]add[ARGS]{8, 9}", "add", READ + "it is not valid JSON"),
        (MISTRAL, "[TOOL_CALLS]add[ARGS][8, 9]", "add", READ + "its arguments are not a JSON object"),
    ],
)
def test_whatever_is_wrong_with_a_call_is_told_to_the_model(
    name: str, text: str, call_name: str, error: str
) -> None:
    (call,) = parsed(name, text).calls
    assert call.name == call_name
    assert error in str(call.error)
    assert len(str(call.error)) < 600


def test_a_call_that_cannot_be_read_stays_in_the_content_and_the_others_are_made() -> None:
    broken = '<tool_call>{"name": "add", "arguments": {</tool_call>'
    turn = parsed(QWEN, f"Two.\n<tool_call>{ADD_JSON}</tool_call>\n{broken}\n<tool_call>{FIND_JSON}</tool_call>")
    assert turn.message == said(f"Two.\n\n{broken}", ADD, FIND)
    assert [(call.name, call.error is None) for call in turn.calls] == [
        ("add", True),
        ("add", False),
        ("find", True),
    ]
    one_bad = parsed(MISTRAL, f'[TOOL_CALLS][{ADD_JSON}, {{"arguments": {{}}}}]')
    assert [call.error is None for call in one_bad.calls] == [True, False]
    assert one_bad.message["content"] == f'[{ADD_JSON}, {{"arguments": {{}}}}]'
    assert len(one_bad.message["tool_calls"]) == 1


def test_a_call_of_no_tool_or_with_wrong_arguments_is_part_of_the_message() -> None:
    turn = parsed(QWEN, '<tool_call>{"name": "sub", "arguments": {"c": 1}}</tool_call>')
    assert turn.message == said("", ("sub", {"c": 1}))
    assert turn.calls[0].arguments == {"c": 1}


THOUGHT = f"<think>\nMaybe <tool_call>{ADD_JSON}</tool_call>?\n</think>\n\n"


def test_thoughts_go_where_the_template_reads_them_and_call_nothing() -> None:
    inside = THOUGHT.split("\n")[1]
    turn = parsed("qwen3", f"{THOUGHT}It is 17.<|im_end|>")
    assert turn == ParsedTurn(said("It is 17.", reasoning_content=inside), [])
    turn = parsed("qwen3", f"{THOUGHT}<tool_call>{FIND_JSON}</tool_call><|im_end|>")
    assert turn.message == said("", FIND, reasoning_content=inside)
    # Qwen 2.5's template knows no thoughts.
    assert parsed(QWEN, f"{THOUGHT}It is 17.<|im_end|>") == ParsedTurn(said(f"{THOUGHT}It is 17."), [])
    turn = parsed(QWEN, f"{THOUGHT}So.<tool_call>{FIND_JSON}</tool_call><|im_end|>")
    assert turn.message == said(f"{THOUGHT}So.", FIND)


def test_thoughts_that_the_prompt_began_end_where_the_turn_ends_them() -> None:
    turn = parsed("qwen3_5", "Hm.\n</think>\n\n17<|im_end|>", prefix="<|im_start|>assistant\n<think>\n")
    assert turn.message == said("17", reasoning_content="Hm.")
    turn = parsed("qwen3_5", f"Hm. <tool_call>{ADD_JSON}", prefix="<|im_start|>assistant\n<think>\n")
    assert turn == ParsedTurn(said("", reasoning_content=f"Hm. <tool_call>{ADD_JSON}"), [])
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert parsed("qwen3", "17<|im_end|>", prefix=closed).message == said("17")


def test_ids_are_nine_characters_of_place_and_turn_where_the_template_reads_them() -> None:
    text = f"[TOOL_CALLS][{ADD_JSON}, {ADD_JSON}]"
    first, second = (call.id for call in parsed(MISTRAL, text, prefix="x").calls)
    assert (first, second) == ("000010000", "000010001")
    assert parsed(MISTRAL, text, prefix="x") == parsed(MISTRAL, text, prefix="x")
    assert parsed(MISTRAL, text, prefix="x y").calls[0].id not in (first, second)
    own = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "AbCdEf123"}, {"name": "add", "id": "short"}]'
    turn = parsed(MISTRAL, own)
    assert [call.id for call in turn.calls] == ["AbCdEf123", "000000001"]
    assert turn.message["tool_calls"][0]["id"] == "AbCdEf123"
    assert parsed(QWEN, f"<tool_call>{ADD_JSON}</tool_call>").calls[0].id is None


def test_half_a_pair_of_surrogates_becomes_text_that_can_be_written() -> None:
    turn = parsed(QWEN, r'<tool_call>{"name": "find", "arguments": {"text": "\ud800 x"}}</tool_call>')
    assert turn.calls == [ToolCall("find", {"text": "? x"}, None, None)]
    assert result_text("\ud800 x") == "? x"


RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<<call>>",
            "close": "<<end>>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"},
    },
}


def test_the_tokenizers_own_response_template_comes_first() -> None:
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.response_template = RESPONSE_TEMPLATE
    text = f"Hm.</think>I add.<<call>>{ADD_JSON}<<end>><<call>>{FIND_JSON}<<end>><|im_end|>"
    prompt = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<think>"
    turn = parsed("", text, prefix=prompt, tokenizer=tokenizer)
    assert turn.message == said("I add.", ADD, FIND, thinking="Hm.")
    assert [call.error for call in turn.calls] == [None, None]
    bad = '<<call>>{"arguments": {}}<<end>><<call>>{"name": "add", "arguments": [1]}<<end>><<call>>3<<end>>'
    turn = parsed("", bad, prefix=prompt + "</think>", tokenizer=tokenizer)
    assert [(call.name, call.error is None) for call in turn.calls] == [
        ("unknown", False),
        ("add", False),
        ("unknown", False),
    ]
    assert "tool_calls" not in turn.message
    assert parsed("", "It is 17.<|im_end|>", prefix=prompt + "</think>", tokenizer=tokenizer).calls == []


def test_what_a_response_template_fails_on_is_read_as_the_chat_template_shows_it_or_told() -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    tokenizer.response_template = RESPONSE_TEMPLATE
    turn = parsed("", f"<<call>>{{<tool_call>{ADD_JSON}</tool_call>", tokenizer=tokenizer)
    assert [call.name for call in turn.calls] == ["add"]
    tokenizer.chat_template = template_text("gemma")
    turn = parsed("", "<<call>>{<<end>>", tokenizer=tokenizer)
    assert turn.message == said("<<call>>{<<end>>")
    assert READ in str(turn.calls[0].error)
    assert TurnParser(tokenizer).why_no_calls() is None


def test_of_a_template_without_a_known_format_it_is_told_what_to_set() -> None:
    parser = TurnParser(byte_tokenizer())
    assert "set model.chat_template to one that does" in str(parser.why_no_calls())
    assert TurnParser(byte_tokenizer(), template_text(QWEN)).why_no_calls() is None


@pytest.mark.parametrize(
    "value",
    ["17\n", 17, 1.5, True, None, {"a": [1, "x"]}, [1, "x"], (1,), b"x", date(2026, 11, 26), ValueError("x")],
)
def test_a_result_is_told_as_trl_tells_it(value: Any) -> None:
    assert result_text(value) == str(value)


@pytest.mark.parametrize("entry", json.loads(TURNS_FILE.read_text(encoding="utf-8")), ids=lambda e: e["template"])
def test_a_turn_says_what_trl_reads_in_it_with_its_schema_of_the_model(entry: dict[str, Any]) -> None:
    tokenizer = chat_tokenizer(entry["template"])
    ids = tokenizer(entry["turn"], add_special_tokens=False)["input_ids"]
    turn = TurnParser(tokenizer).parse(ids, TOOLS, prefix=prompt_ids(tokenizer))
    assert turn.message == entry["message"]


def test_a_message_is_json_and_renders_again() -> None:
    for name, text in (
        (QWEN, f"x<tool_call>{FIND_JSON}"),
        (MISTRAL, f"[TOOL_CALLS][{FIND_JSON}]"),
        (LLAMA, FIND_JSON),
    ):
        tokenizer = chat_tokenizer(name)
        message = parsed(name, text).message
        assert json.loads(json.dumps(message)) == message
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x"}, message], tokenize=False)
        assert "find" in rendered
