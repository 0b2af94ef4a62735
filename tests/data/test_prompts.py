"""Prompts become the tokens that the model sees, and those that are too long go where the settings say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_cli.data.prompts import Prompt, PromptDataset
from grpo_cli.data.rows import PromptRows, load_rows
from grpo_cli.errors import UserError
from grpo_cli.recipe.data_config import EvalDataConfig

GSM8K = [
    {"question": "What is 2 + 3 ?", "answer": "Add.\n#### 5"},
    {"question": "What is 2 + 2 + 2 ?", "answer": "#### 6"},
]
WORDS = re.findall(r"\S+", "What is + ? 1 2 3 4 5 6 Be brief . Hi you system user assistant <s> [unk] { }")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}{% if mood %}{{ mood }}{% endif %}"
)


def make_tokenizer(chat_template: str | None = TEMPLATE, **special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[unk]", chat_template=chat_template, **special
    )


TOKENIZER = make_tokenizer()


def config(**settings: Any) -> EvalDataConfig:
    return EvalDataConfig(**({"name": "here"} | settings))


def rows_of(data: object, **settings: Any) -> PromptRows:
    return load_rows(config(**settings), data=data)


def dataset_of(data: object, tokenizer: Any = TOKENIZER, **settings: Any) -> PromptDataset:
    return PromptDataset(rows_of(data, **settings), tokenizer)


def text(token_ids: list[int]) -> str:
    return " ".join(WORDS[token] for token in token_ids)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_gsm8k_rows_become_prompts_with_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    rows = PromptRows(config(name=str(path), columns={"question": "prompt"}))
    assert (rows.setting, rows.columns, rows.conversational, len(rows)) == ("data", ["answer"], False, 2)
    data = PromptDataset(rows, TOKENIZER)
    assert data[1] == Prompt(
        row=1,
        content="What is 2 + 2 + 2 ?",
        token_ids=TOKENIZER("What is 2 + 2 + 2 ?")["input_ids"],
        columns={"answer": "#### 6"},
    )
    assert [prompt.row for prompt in data] == [0, 1]


def test_message_lists_go_through_the_chat_template_with_a_generation_prompt() -> None:
    data = dataset_of([{"prompt": [user("Hi you"), {"role": "assistant", "content": "Hi"}, user("What ?")]}])
    assert data.rows.conversational
    assert text(data[0].token_ids) == "user Hi you assistant Hi user What ? assistant"


def test_settings_of_the_chat_template_reach_it() -> None:
    data = PromptDataset(rows_of([{"prompt": [user("Hi")]}]), TOKENIZER, chat_template_kwargs={"mood": "brief"})
    assert text(data[0].token_ids) == "user Hi assistant brief"


def test_a_system_prompt_makes_a_chat_of_a_string() -> None:
    data = dataset_of(GSM8K, columns={"question": "prompt"}, system_prompt="Be brief .")
    assert data.rows.conversational
    assert data[0].content == [{"role": "system", "content": "Be brief ."}, user("What is 2 + 3 ?")]
    assert text(data[0].token_ids) == "system Be brief . user What is 2 + 3 ? assistant"


CHAT = {"prompt": [user("Hi")]}


LONG = [{"prompt": "Hi " * length, "n": length} for length in (2, 5, 3, 9)]


def test_prompts_over_the_limit_are_dropped_and_counted() -> None:
    data = dataset_of(LONG, max_prompt_tokens=3)
    assert (len(data), data.dropped, data.truncated) == (2, 2, 0)
    assert [(prompt.row, len(prompt.token_ids), prompt.columns["n"]) for prompt in data] == [
        (0, 2, 2),
        (2, 3, 3),
    ]


def test_prompts_over_the_limit_keep_their_last_tokens_when_truncated() -> None:
    rows = [{"prompt": "1 2 3 4 5"}, {"prompt": "1 2"}]
    data = dataset_of(rows, max_prompt_tokens=3, long_prompts="truncate_left")
    assert (len(data), data.dropped, data.truncated) == (2, 0, 1)
    assert [text(prompt.token_ids) for prompt in data] == ["3 4 5", "1 2"]
    assert data[0].content == "1 2 3 4 5"


def test_the_limit_counts_the_chat_template() -> None:
    data = dataset_of([{"prompt": [user("Hi")]}, {"prompt": [user("Hi you")]}], max_prompt_tokens=3)
    assert [prompt.row for prompt in data] == [0]


@pytest.mark.parametrize(
    ("limit", "policy", "message"),
    [
        (
            3,
            "error",
            "data.max_prompt_tokens: row 2 has 5 tokens, more than 3 (2 of 4 rows do); raise it, or",
        ),
        (1, "drop", "data.max_prompt_tokens: every prompt has more than 1 tokens, the shortest 2; raise it"),
        (1, "error", "data.max_prompt_tokens: every prompt has more than 1 tokens, the shortest 2; raise it"),
    ],
)
def test_too_long_prompts_are_an_error_when_asked_or_when_none_is_left(
    limit: int, policy: str, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        dataset_of(LONG, max_prompt_tokens=limit, long_prompts=policy)


@pytest.mark.parametrize("system_prompt", [None, "Be brief ."])
def test_tokens_do_not_depend_on_whether_a_limit_is_set(system_prompt: str | None) -> None:
    rows = [{"prompt": f"What is {number % 6} + 1 ?" + " Hi" * (number % 5)} for number in range(600)]
    once = dataset_of(rows, max_prompt_tokens=99, system_prompt=system_prompt)
    each = dataset_of(rows, system_prompt=system_prompt)
    assert list(once) == list(each)


class CountingTokenizer:
    """Counts the texts that it turns into tokens."""

    chat_template = None
    texts = 0

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        self.texts += len(texts)
        return {"input_ids": [[len(text)] for text in texts]}


def test_each_prompt_is_tokenized_once_with_a_limit_and_none_up_front_without() -> None:
    with_limit, without = CountingTokenizer(), CountingTokenizer()
    data = dataset_of(LONG, with_limit, max_prompt_tokens=9)
    assert len(list(data)) == with_limit.texts == 4
    dataset_of(LONG, without)
    assert without.texts == 0


def test_a_chat_needs_a_tokenizer_with_a_chat_template() -> None:
    plain = make_tokenizer(chat_template=None)
    assert len(dataset_of(GSM8K, plain, columns={"question": "prompt"})[0].token_ids) == 6
    with pytest.raises(UserError, match=r"the tokenizer has no chat template; set model\.chat_template, or use"):
        dataset_of([CHAT], plain)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for n in range(10000000) %}{% endfor %}",
    ],
)
def test_a_chat_template_reaches_nothing_but_the_messages(template: str) -> None:
    with pytest.raises(UserError, match="data: row 1: the chat template fails on the prompt: "):
        dataset_of([CHAT], make_tokenizer(template))


def test_a_template_in_a_message_is_text() -> None:
    tokenizer = make_tokenizer("{{ messages[0]['content'] }}")
    rows = dataset_of([{"prompt": [user("{{ 7 * 7 }} {% raise %}")]}], tokenizer)
    rendered = tokenizer.apply_chat_template(rows.rows.content(0), tokenize=False)
    assert rendered == "{{ 7 * 7 }} {% raise %}"


@pytest.mark.parametrize("limit", [None, 50])
def test_a_chat_template_that_fails_names_the_row(limit: int | None) -> None:
    refusing = TEMPLATE + "{% if messages[0]['content'] == 'What' %}{{ raise_exception('no What') }}{% endif %}"
    rows = [CHAT, {"prompt": [user("What")]}]
    with pytest.raises(UserError, match=r"data: row 2: the chat template fails on the prompt: .*: no What"):
        list(dataset_of(rows, make_tokenizer(refusing), max_prompt_tokens=limit))


def test_a_prompt_without_tokens_becomes_the_token_for_the_beginning_of_a_text() -> None:
    rows = [{"prompt": "\u200b"}]
    empty = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="[unk]"))
    empty.pre_tokenizer = pre_tokenizers.Split("\u200b", "removed")
    with_start = PreTrainedTokenizerFast(tokenizer_object=empty, bos_token="<s>")
    assert dataset_of(rows, with_start)[0].token_ids == [with_start.bos_token_id]
    with pytest.raises(UserError, match="data: row 1 has no tokens with this tokenizer"):
        list(dataset_of(rows, PreTrainedTokenizerFast(tokenizer_object=empty)))


def test_an_index_past_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        dataset_of(GSM8K, columns={"question": "prompt"})[2]
