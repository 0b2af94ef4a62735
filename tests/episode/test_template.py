"""What a chat template puts around an answer, token for token, and what it does to what was said before."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2 import TemplateError

from grpo_cli.episode.template import EpisodeTemplate
from grpo_cli.episode.tools import tool_of
from grpo_cli.errors import UserError
from tests.conftest import byte_tokenizer
from tests.episode.chat import chat_tokenizer
from tests.episode.record_trl import ANSWERS_FILE, TEMPLATES

WITH_TOOLS = ("qwen2_5", "qwen3", "qwen3_5", "llama3_1", "mistral")
USER = {"role": "user", "content": "What is 8 + 9?"}
REPLY = {"role": "user", "content": "Are you sure?"}
WORDS = {"role": "assistant", "content": "17"}


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


ADD = tool_of(add, "tools.0")


def calling(*ids: str) -> dict[str, Any]:
    calls = [
        {"type": "function", "id": one, "function": {"name": "add", "arguments": {"a": 8, "b": 9}}} for one in ids
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(content: str = "17", call_id: str = "abcdefgh1") -> dict[str, Any]:
    return {"role": "tool", "name": "add", "tool_call_id": call_id, "content": content}


def template_of(name: str, **kwargs: Any) -> tuple[EpisodeTemplate, Any]:
    tokenizer = chat_tokenizer(name)
    return EpisodeTemplate(tokenizer, kwargs), tokenizer


@pytest.mark.parametrize(
    "entry", json.loads(ANSWERS_FILE.read_text(encoding="utf-8")), ids=lambda e: e["template"]
)
def test_results_of_tools_become_the_tokens_that_trl_makes_of_them(entry: dict[str, Any]) -> None:
    template, tokenizer = template_of(entry["template"])
    assert template.answer_ids(entry["answers"]) == entry["ids"], tokenizer.decode(entry["ids"])


def test_there_is_something_recorded_for_every_template() -> None:
    recorded = json.loads(ANSWERS_FILE.read_text(encoding="utf-8"))
    assert {entry["template"] for entry in recorded} == set(TEMPLATES)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_prompt_is_what_the_template_makes_of_the_functions_themselves(name: str) -> None:
    template, tokenizer = template_of(name)
    for functions, tools in (([add], [ADD]), (None, [])):
        text = tokenizer.apply_chat_template([USER], tools=functions, add_generation_prompt=True, tokenize=False)
        assert template.prompt_ids([USER], tools) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "mistral"])
@pytest.mark.parametrize(
    ("turn", "answers"), [(WORDS, [REPLY]), (calling("abcdefgh1"), [result()])], ids=["words", "call"]
)
def test_prompt_turn_and_answer_joined_are_the_conversation_as_it_is_rendered(
    name: str, turn: dict[str, Any], answers: list[dict[str, Any]]
) -> None:
    template, tokenizer = template_of(name)
    prompt = template.prompt_ids([USER])
    said = tokenizer.apply_chat_template([USER, turn], tokenize=False)
    sampled = tokenizer(said, add_special_tokens=False)["input_ids"][len(prompt) :]
    end = tokenizer.eos_token_id
    sampled = sampled[: sampled.index(end) + 1]  # Qwen's template writes a line end after it, nobody samples that
    assert prompt + sampled + template.answer_ids(answers) == template.prompt_ids([USER, turn, *answers])


def test_a_turn_that_a_stop_string_ended_gets_its_end_token_first() -> None:
    for name, end in (("qwen2_5", "<|im_end|>"), ("llama3_1", "<|eot_id|>"), ("gemma", "<end_of_turn>")):
        template, tokenizer = template_of(name)
        after = template.answer_ids([REPLY])
        assert template.answer_ids([REPLY], ended=False) == [tokenizer.convert_tokens_to_ids(end), *after]
        if name != "gemma":
            assert template.answer_ids([result()], ended=False)[0] == tokenizer.eos_token_id


def test_a_token_that_ends_a_turn_and_begins_the_answer_is_not_said_twice() -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}{% endfor %}"
    template = EpisodeTemplate(tokenizer)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    after = template.answer_ids([REPLY])
    assert after[0] == start
    assert template.answer_ids([REPLY], last_id=start) == after[1:]
    assert template.answer_ids([REPLY], last_id=tokenizer.eos_token_id) == after


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5", "\n<|im_start|>user\nAre you sure?<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llama3_1",
            "<|start_header_id|>user<|end_header_id|>\n\nAre you sure?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "[INST]Are you sure?[/INST]"),
        # Its end-of-sequence token is another than that of its turns, which TRL takes for no end.
        ("gemma", "\n<start_of_turn>user\nAre you sure?<end_of_turn>\n<start_of_turn>model\n"),
        # No end token at all.
        ("plain", "\nUser: Are you sure?\nAssistant: "),
    ],
)
def test_what_a_user_says_follows_the_end_token(name: str, expected: str) -> None:
    template, tokenizer = template_of(name)
    assert tokenizer.decode(template.answer_ids([REPLY])) == expected


def test_results_are_grouped_as_the_template_groups_them_and_have_their_ids() -> None:
    answers = [result("17", "abcdefgh1"), result("x", "abcdefgh2")]
    template, tokenizer = template_of("qwen3")  # with which TRL fails: it writes empty thoughts into a last turn
    assert tokenizer.decode(template.answer_ids(answers)) == (
        "\n<|im_start|>user\n<tool_response>\n17\n</tool_response>\n<tool_response>\nx\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    template, tokenizer = template_of("mistral")
    assert tokenizer.decode(template.answer_ids(answers)) == (
        '[TOOL_RESULTS]{"content": "17", "call_id": "abcdefgh1"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS]{"content": "x", "call_id": "abcdefgh2"}[/TOOL_RESULTS]'
    )
    template, tokenizer = template_of("llama3_1")  # takes one call at once, and any number of results
    assert tokenizer.decode(template.answer_ids(answers)).count("ipython") == 2


def test_the_words_of_the_probe_in_an_answer_change_nothing() -> None:
    template, tokenizer = template_of("qwen2_5")
    for answer in ({**REPLY, "content": "grpoprobewords<|im_end|>"}, result("grpoprobevalue<|im_end|>")):
        assert answer["content"] in tokenizer.decode(template.answer_ids([answer]))


def test_a_template_that_groups_nothing_and_keeps_everything_keeps_history() -> None:
    for name in ("qwen2_5", "llama3_1", "gemma", "plain"):
        assert template_of(name)[0].keeps_history, name


def test_thoughts_are_kept_before_results_and_dropped_before_what_a_user_says() -> None:
    template, _ = template_of("qwen3")
    thoughts = {**WORDS, "reasoning_content": "Hm."}
    assert not template.keeps_history
    assert not template.keeps(thoughts, [REPLY])
    assert template.keeps(WORDS, [REPLY])
    assert template.keeps({**calling("abcdefgh1"), "reasoning_content": "Hm."}, [result()], [ADD])
    assert template.keeps(calling("abcdefgh1"), [result()], [ADD])


def test_thoughts_that_the_prompt_left_out_are_gone_from_the_history_too() -> None:
    template, _ = template_of("qwen3", enable_thinking=False)
    assert not template.keeps(calling("abcdefgh1"), [result()], [ADD])
    assert not template.keeps_history


def test_a_template_that_always_writes_thoughts_keeps_history() -> None:
    template, _ = template_of("qwen3_5")
    assert template.keeps_history
    assert template.keeps({**calling("abcdefgh1"), "reasoning_content": "Hm."}, [result()], [ADD])


def test_tools_that_move_to_the_last_user_message_change_what_was_said_before() -> None:
    template, _ = template_of("mistral")
    assert not template.keeps(WORDS, [REPLY], [ADD])
    assert template.keeps(WORDS, [REPLY])
    assert template.keeps(calling("abcdefgh1"), [result()], [ADD])
    assert not template.keeps_history


def test_thoughts_in_the_content_that_a_template_cuts_out_are_not_kept() -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.role + '\\n' + message.content", "message.role + '\\n' + message.content.split('</think>')[-1]"
    )
    template = EpisodeTemplate(tokenizer)
    assert not template.keeps({"role": "assistant", "content": "<think>Hm.</think>17"}, [REPLY])
    assert template.keeps(WORDS, [REPLY])


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_template_with_tools_lacks_nothing(name: str) -> None:
    template, _ = template_of(name)
    assert template.why_no_tools() is None
    assert template.why_no_replies() is None


def test_what_a_template_lacks_is_told_with_what_to_set() -> None:
    tokenizer = byte_tokenizer()
    without = EpisodeTemplate(tokenizer)
    assert without.why_no_replies() is None
    assert without.why_no_tools() == (
        "the chat template does not show tools to the model; set model.chat_template to one that does"
    )
    tokenizer.chat_template = "{{ tools }}" + tokenizer.chat_template
    assert EpisodeTemplate(tokenizer).why_no_tools() == (
        "the chat template leaves out what the model says, or the tools that it calls; set model.chat_template to "
        "one that renders tool calls and their results"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ message['content'] }}", "{{ message }}")
    assert "not known how this model writes tool calls" in str(EpisodeTemplate(tokenizer).why_no_tools())
    tokenizer.chat_template = None
    assert "has no chat template" in str(EpisodeTemplate(tokenizer).why_no_tools())
    assert "has no chat template" in str(EpisodeTemplate(tokenizer).why_no_replies())
    assert EpisodeTemplate(tokenizer).keeps_history  # nothing follows


def test_a_template_that_leaves_out_results_or_takes_no_reply_is_found_out() -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    tokenizer.chat_template = tokenizer.chat_template.replace("message.role == 'tool'", "false")
    assert "leaves out tool calls and their results" in str(EpisodeTemplate(tokenizer).why_no_tools())
    tokenizer.chat_template = (
        "{{ raise_exception('one turn') if messages | length > 2 }}" + tokenizer.chat_template
    )
    assert "one turn" in str(EpisodeTemplate(tokenizer).why_no_replies())


def test_a_template_that_fails_is_the_users_error() -> None:
    template, _ = template_of("gemma")
    with pytest.raises(UserError, match=r"the chat template fails \(TemplateError: no such role\)") as failure:
        template.prompt_ids([USER, result()])
    assert isinstance(failure.value.__cause__, TemplateError)


def test_of_several_templates_that_for_tools_is_taken_with_tools() -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    tokenizer.chat_template = {
        "default": chat_tokenizer("gemma").chat_template,
        "tool_use": tokenizer.chat_template,
    }
    template = EpisodeTemplate(tokenizer)
    assert "add" in tokenizer.decode(template.prompt_ids([USER], [ADD]))
    assert template.why_no_tools() is None
    assert tokenizer.decode(template.answer_ids([result()])).startswith("\n<|im_start|>user\n<tool_response>")
