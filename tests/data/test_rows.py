"""Rows become prompts as the settings say, and a row that cannot is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from grpo_cli.data.rows import PromptRows, load_rows
from grpo_cli.errors import UserError
from grpo_cli.recipe.data_config import EvalDataConfig

GSM8K = [
    {"question": "What is 2 + 3 ?", "answer": "Add.\n#### 5"},
    {"question": "What is 2 + 2 + 2 ?", "answer": "#### 6"},
]


def config(**settings: Any) -> EvalDataConfig:
    return EvalDataConfig(**({"name": "here"} | settings))


def rows_of(data: object, **settings: Any) -> PromptRows:
    return load_rows(config(**settings), data=data)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_a_system_prompt_comes_before_the_messages() -> None:
    rows = rows_of([{"prompt": [user("Hi")]}], system_prompt="Be brief .")
    assert rows.content(0) == [{"role": "system", "content": "Be brief ."}, user("Hi")]


def test_messages_hold_only_the_keys_that_their_row_has() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    prompts = [
        [user("Hi")],
        [
            user("Hi"),
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "1", "name": "add"},
        ],
        [{"role": "user", "content": "x", "extra": {"arguments": {"b": None, "c": 2}}}],
    ]
    rows = rows_of([{"prompt": prompt} for prompt in prompts])
    del prompts[2][0]["extra"]["arguments"]["b"]  # type: ignore[attr-defined]
    assert [rows.content(row) for row in range(3)] == prompts


def test_what_is_handed_out_may_be_changed_without_harm() -> None:
    rows = rows_of([{"prompt": [user("Hi")], "tags": ["a"]}])
    rows.content(0)[0]["content"] = "gone"  # type: ignore[index]
    rows.row_columns(0)["tags"].append("b")
    assert rows.content(0) == [user("Hi")]
    assert rows.row_columns(0) == {"tags": ["a"]}


def test_a_template_builds_the_prompt_and_leaves_the_columns() -> None:
    rows = rows_of(GSM8K, prompt_template="{question} {{brief}} {answer:.4}")
    assert rows.content(0) == "What is 2 + 3 ? {brief} Add."
    assert rows.columns == ["question", "answer"]


def test_a_template_may_use_the_prompt_column_which_rewards_then_do_not_get() -> None:
    rows = rows_of([{"prompt": 12, "answer": "{x}"}], prompt_template="What is {prompt} ? {answer}")
    assert rows.content(0) == "What is 12 ? {x}"
    assert rows.columns == ["answer"]


def test_a_template_with_a_system_prompt_makes_a_chat() -> None:
    rows = rows_of(GSM8K, prompt_template="{question}", system_prompt="Be brief .")
    assert rows.content(0)[1] == user("What is 2 + 3 ?")


def test_two_columns_may_swap_names() -> None:
    rows = rows_of([{"prompt": "a", "answer": "b"}], columns={"prompt": "answer", "answer": "prompt"})
    assert (rows.content(0), rows.row_columns(0)) == ("b", {"answer": "a"})


def test_the_prompt_column_may_have_a_name_that_rewards_reserve() -> None:
    assert rows_of([{"prompts": "a", "answer": 1}], prompt_column="prompts").columns == ["answer"]


def test_limit_takes_the_first_rows_and_never_looks_at_the_others() -> None:
    table = pa.table({"prompt": ["a", "b", None, ""]})
    assert len(PromptRows(config(limit=2), table=table)) == 2


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_text_may_come_in_any_arrow_type(kind: pa.DataType) -> None:
    rows = PromptRows(config(), table=pa.table({"prompt": pa.array(["a", "b"]).cast(kind)}))
    assert [rows.content(row) for row in range(2)] == ["a", "b"]


CHAT = {"prompt": [user("Hi")]}


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (GSM8K, {}, "data.prompt_column: there is no column 'prompt'; the columns are question, answer. Name "
         "the one that holds the prompt with data.columns: {question: prompt}, or build the prompt from "
         "columns with "
         'data.prompt_template: "{question}"'),
        ([{"a": "x", "promt": "y"}], {}, "data.columns: {promt: prompt}"),
        (GSM8K, {"columns": {"qestion": "prompt"}}, "data.columns: there is no column 'qestion' to rename; "
         "the columns are question, answer; did you mean question?"),
        (GSM8K, {"columns": {"question": "answer"}}, "data.columns: two columns would be named 'answer'"),
        ([{"prompt": "a", "completions": "b"}], {}, "rename it with data.columns: {completions: "),
        ([{"prompt": "a", "completion_ids": [1]}], {}, "functions get an argument completion_ids already"),
        ([{"prompt": "a", "prompts": "b"}], {"prompt_template": "{prompt}"}, "an argument prompts already"),
        ([{"prompt": "a"}, {"prompt": None}], {}, "data: row 2 has no prompt (null)"),
        ([{"prompt": None}], {}, "data: row 1 has no prompt (null)"),
        ([CHAT, {"prompt": None}], {}, "data: row 2 has no prompt (null)"),
        ([{"prompt": "a"}, {"prompt": " \n\u00a0"}], {}, "data: row 2 has an empty prompt"),
        ([{"prompt": ""}], {"system_prompt": "x"}, "data: row 1 has an empty prompt"),
        ([{"prompt": 1}], {}, 'holds int64, neither text nor lists of messages; data.prompt_template: "{pr'),
        ([{"prompt": ["a"]}], {}, "prompt holds list<item: string>, neither"),
        ([{"prompt": b"a"}], {}, "prompt holds binary, neither"),
        ([], {}, "data has no rows"),
        ([{}], {}, "data has no rows"),
        ([{"prompt": []}], {}, "data: row 1 has an empty list of messages"),
        ([{"prompt": [{"role": "user"}]}], {}, "data: row 1 message 1 needs a role and a content; it is {"),
        ([{"prompt": [user("Hi"), {"content": "x"}]}], {}, "row 1 message 2 needs a role and a content"),
        ([{"prompt": [user("Hi"), None]}], {}, "row 1 message 2 needs a role and a content; it"),
        ([{"prompt": [user("Hi"), {"role": "assistant", "content": "5"}]}], {}, "row 1 ends with an assist"),
        ([{"prompt": [{"role": "system", "content": "x"}, user("Hi")]}], {"system_prompt": "y"},
         "data: row 1 begins with a system message already; remove data.system_prompt"),
        ([CHAT], {"prompt_template": "{prompt}"}, "data.prompt_template: column prompt holds lists"),
        (GSM8K, {"prompt_template": "{qestion}"}, "data.prompt_template: there is no column 'qestion'; the "
         "columns are question, answer; did you mean {question}?"),
        (GSM8K, {"prompt_template": "{question:{width}}"}, "there is no column 'width'"),
        (GSM8K, {"prompt_template": "{}"}, "data.prompt_template: {} names no column"),
        (GSM8K, {"prompt_template": "{0}"}, "data.prompt_template: {0} names no column"),
        (GSM8K, {"prompt_template": "{question"}, "data.prompt_template: expected '}'"),
        (GSM8K, {"prompt_template": "Hi"}, "data.prompt_template: uses no column"),
        (GSM8K, {"prompt_template": "{question:d}"}, "row 1 does not fit data.prompt_template: ValueE"),
        (GSM8K, {"prompt_template": "{question.x}"}, "row 1 does not fit data.prompt_template: Attri"),
        ([{"a": " "}], {"prompt_template": "{a}"}, "row 1 makes an empty prompt with data.prompt"),
        ([{"a": "x"}, {"a": None}], {"prompt_template": "{a}"}, "data: row 2 has no a (null)"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_prompts_are_named(data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        rows_of(data, **settings)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "row 2 has an empty list"),
        ([{"role": "system", "content": "x"}, user("Hi")], "row 2 begins with a system message"),
        ([{"role": "assistant", "content": "x"}], "row 2 ends with an assistant message"),
    ],
)
def test_a_later_chat_that_is_wrong_is_named_when_it_is_met(prompt: Any, message: str) -> None:
    rows = rows_of([CHAT, {"prompt": prompt}], system_prompt="Be brief .")
    assert len(rows) == 2
    with pytest.raises(UserError, match=message):
        rows.content(1)


def test_messages_name_the_data_and_the_section_that_they_are_about(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer\n"two\nlines",1\n,2\n')
    with pytest.raises(UserError, match=rf"^data\.eval: {path}: row 2 has an empty prompt"):
        load_rows(config(name=str(path)), setting="data.eval")
    with pytest.raises(UserError, match=r"^data\.eval\.prompt_column: there is no column 'text'"):
        load_rows(config(name=str(path), prompt_column="text"), setting="data.eval")
