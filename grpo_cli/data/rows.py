"""The rows of a data set and the prompt of each. They need no tokenizer, so `grpo check` can look at them.

What can be checked for all rows at once is checked when they are loaded. An error in a single prompt is raised
when that prompt is asked for, and names its row. No torch import.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from grpo_cli.data.files import listed
from grpo_cli.data.sources import load_table, table_from_object
from grpo_cli.errors import UserError, one_line
from grpo_cli.recipe.data_config import EvalDataConfig
from grpo_cli.recipe.schema import REWARD_ARGUMENTS, Recipe

Messages = list[dict[str, Any]]

_USUAL_PROMPT_COLUMNS = ("question", "problem", "instruction", "query", "input", "text", "messages")

MAX_WIDTH = 10_000
"""Width and precision of a field in a prompt template."""

MAX_PROMPT = 2**24
"""Characters of a prompt that a template makes: several times the longest context of any model."""


EMPTY_PROMPT: Messages = [{"role": "user", "content": ""}]
"""What a prompt is to which an environment adds all the text."""


class PromptRows:
    """Rows of a data set with their prompts, before any tokenizer.

    Args:
        config: which data, and how prompts are made of it.
        setting: `data` or `data.eval`, for messages.
        table: used instead of loading what `config.name` says.
        made_by_environments: prompts may be missing, and are then an empty user message each, which an environment
            adds its own text to.

    Raises:
        UserError: the data cannot be loaded, or a column or a prompt is not as the settings say.
    """

    setting: str
    columns: list[str]
    """Names after renaming, without the prompt column."""
    conversational: bool
    """Prompts are lists of messages."""
    where: str
    """`setting` and, if the data were loaded, their name; for messages about a row."""

    def __init__(
        self,
        config: EvalDataConfig,
        *,
        setting: str = "data",
        table: pa.Table | None = None,
        made_by_environments: bool = False,
    ) -> None:
        self.config = config
        self.setting = setting
        self.where = setting if table is not None else f"{setting}: {config.name}"
        table = load_table(config, setting) if table is None else table
        if config.limit is not None:
            table = table.slice(0, min(config.limit, table.num_rows))
        if table.num_rows == 0:
            raise UserError(f"{self.where} has no rows")
        try:
            table.validate(full=True)  # text that is not UTF-8 would fail only where it is met
        except pa.ArrowException as error:
            raise UserError(f"{self.where} is damaged: {one_line(error)}") from error
        self._table = self._rename(table)
        if made_by_environments and config.prompt_template is None:
            self._table = _with_prompts(self._table, config.prompt_column)
        self._json_columns = {field.name for field in self._table.schema if "arrow.json" in str(field.type)}
        self.columns = [name for name in self._table.column_names if name != config.prompt_column]
        self._check_reserved()
        self._template_columns: list[str] = []
        if config.prompt_template is None:
            messages = self._check_prompt_column()
        else:
            messages = False
            self._template_columns = self._check_template(config.prompt_template)
        self.conversational = messages or config.system_prompt is not None
        self.content(0)

    def __len__(self) -> int:
        return self._table.num_rows

    def content(self, row: int) -> str | Messages:
        """The prompt of a row: a string, or the messages of a chat when `conversational`."""
        prompt = self._template(row) if self.config.prompt_template is not None else self._prompt(row)
        system = self.config.system_prompt
        if system is None:
            return prompt
        opening = {"role": "system", "content": system}
        if isinstance(prompt, str):
            return [opening, {"role": "user", "content": prompt}]
        if prompt[0]["role"] == "system":
            raise self._error(row, f"begins with a system message already; remove {self.setting}.system_prompt")
        return [opening, *prompt]

    def row_columns(self, row: int) -> dict[str, Any]:
        """The other columns of a row, by name."""
        return {name: self._value(name, row) for name in self.columns}

    def _value(self, name: str, row: int) -> Any:
        column = self._table.column(name)
        try:
            value = column[row].as_py()
            return _decode_json(value, column.type) if name in self._json_columns else value
        except (pa.ArrowException, ValueError, OverflowError, LookupError, RecursionError) as error:
            message = f"has a {name} that Python cannot hold: {one_line(error)}"
            raise self._error(row, message) from error

    def _prompt(self, row: int) -> str | Messages:
        value = self._value(self.config.prompt_column, row)
        return value if isinstance(value, str) else self._messages(row, value)

    def _template(self, row: int) -> str:
        values = {name: self._value(name, row) for name in self._template_columns}
        try:
            prompt = _PromptFormatter().vformat(self.config.prompt_template or "", (), values)
            prompt.encode()  # {code:c} may make half of a surrogate pair
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise self._error(row, f"does not fit {self.setting}.prompt_template: {reason}") from error
        if not prompt.strip():
            raise self._error(row, f"makes an empty prompt with {self.setting}.prompt_template")
        return prompt

    def _messages(self, row: int, value: Any) -> Messages:
        if not isinstance(value, list) or not value:
            raise self._error(row, "has an empty list of messages; remove the row")
        messages: Messages = []
        for number, entry in enumerate(value, 1):
            message = _drop_none(entry) if isinstance(entry, dict) else {}
            said = message.get("content", message.get("tool_calls"))
            if not isinstance(message.get("role"), str) or not isinstance(said, (str, list)):
                raise self._error(row, f"message {number} needs a role and a content; it is {entry!r:.200}")
            messages.append(message)
        if messages[-1]["role"] == "assistant":
            raise self._error(
                row,
                "ends with an assistant message; end with what the model must answer, and keep the "
                "known answer in another column for the rewards",
            )
        return messages

    def _error(self, row: int, message: str) -> UserError:
        return UserError(f"{self.where}: row {row + 1} {message}")

    def _rename(self, table: pa.Table) -> pa.Table:
        present = table.column_names
        for old in self.config.columns:
            if old not in present:
                near = difflib.get_close_matches(old, present, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(
                    f"{self.setting}.columns: there is no column {old!r} to rename; "
                    f"the columns are {listed(present)}{hint}"
                )
        names = [self.config.columns.get(name, name) for name in present]
        for name, count in Counter(names).items():
            if count > 1:
                raise UserError(
                    f"{self.setting}.columns: two columns would be named {name!r}; "
                    f"the columns are {listed(present)}: rename the other one as well"
                )
        return table.rename_columns(names)

    def _check_reserved(self) -> None:
        for name in REWARD_ARGUMENTS:
            if name in self.columns:
                raise UserError(
                    f"{self.setting}.columns: reward functions get an argument {name} already, so no column "
                    f"can have that name; rename it with {self.setting}.columns: {{{name}: {name}_in_data}}"
                )

    def _check_prompt_column(self) -> bool:
        """Check the column of prompts as a whole; return whether it holds lists of messages."""
        name = self.config.prompt_column
        if name not in self._table.column_names:
            raise self._no_prompt_column(name)
        self._check_nulls(name)
        column = self._table.column(name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if _is_text(kind):
            blank = pc.equal(pc.utf8_trim_whitespace(column.cast(pa.large_string())), "")
            first = pc.index(blank, True).as_py()
            if first >= 0:
                raise self._error(first, f"has an empty {name}; remove the row, or write the prompt")
            return False
        if _is_list_of_objects(kind):
            return True
        raise UserError(
            f"{self.setting}.prompt_column: {name} holds {kind}, neither text nor lists of messages; "
            f'{self.setting}.prompt_template: "{{{name}}}" would turn it into text'
        )

    def _check_nulls(self, name: str) -> None:
        column = self._table.column(name)
        if column.null_count:
            first = pc.index(column.is_null(), True).as_py()
            raise self._error(first, f"has no {name} (null); remove the row, or write it")

    def _no_prompt_column(self, name: str) -> UserError:
        others = self.columns
        near = difflib.get_close_matches(name, others, n=1)
        usual = [column for column in _USUAL_PROMPT_COLUMNS if column in others]
        guess = (near + usual + others)[0]
        return UserError(
            f"{self.setting}.prompt_column: there is no column {name!r}; the columns are "
            f"{listed(others)}. Name the one that holds the prompt with {self.setting}.columns: "
            f"{{{guess}: {name}}}, or build the prompt from columns with {self.setting}.prompt_template: "
            f'"{{{guess}}}"'
        )

    def _check_template(self, template: str) -> list[str]:
        """The columns that the template uses."""
        key = f"{self.setting}.prompt_template"
        present = self._table.column_names
        name = self.config.prompt_column
        if name in present and _is_list_of_objects(self._table.schema.field(name).type):
            raise UserError(f"{key}: column {name} holds lists of messages, which are the prompt; remove {key}")
        used: dict[str, None] = {}
        for field in _template_fields(template, key):
            column = re.split(r"[.\[]", field)[0]
            if column not in present:
                near = difflib.get_close_matches(column, present, n=1)
                hint = f"; did you mean {{{near[0]}}}?" if near else ""
                raise UserError(
                    f"{key}: there is no column {column!r}; the columns are {listed(present)}{hint} "
                    "(write {{ and }} for braces that are meant as such)"
                )
            self._check_nulls(column)
            used[column] = None
        return list(used)


class _PromptFormatter(Formatter):
    """What `str.format` does, for values that are not to be looked into and prompts that must end.

    `{answer.__class__}` would tell of Python and not of the row; `{answer:>999999999}` takes a gigabyte.
    """

    def __init__(self) -> None:
        self._length = 0

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value of `column` or `column[entry]`."""
        if "." in re.sub(r"\[[^\]]*\]", "", field_name):
            raise AttributeError(f"{{{field_name}}} asks for an attribute; write {{column}} or {{column[entry]}}")
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        """The field's text; ValueError if it or the prompt is too long."""
        if any(int(number) > MAX_WIDTH for number in re.findall(r"\d{1,9}", format_spec)):
            raise ValueError(f"{format_spec:.50} asks for more than {MAX_WIDTH} characters")
        text: str = super().format_field(value, format_spec)
        self._length += len(text)
        if self._length > MAX_PROMPT:
            raise ValueError(f"the prompt has more than {MAX_PROMPT} characters")
        return text


def load_rows(
    config: EvalDataConfig,
    *,
    setting: str = "data",
    data: object | None = None,
    made_by_environments: bool = False,
) -> PromptRows:
    """Load the rows that `config` names, or take them from `data`.

    Args:
        config: which data, and how prompts are made of it.
        setting: `data` or `data.eval`, for messages.
        data: used instead of `config.name`: a `datasets.Dataset`, list of dicts, pyarrow Table or pandas
            DataFrame.
        made_by_environments: see `PromptRows`.
    """
    if data is not None and config.params:
        raise UserError(f"{setting}.params: the data are an object, so nothing is called with them; remove it")
    table = None if data is None else table_from_object(data, config, setting)
    return PromptRows(config, setting=setting, table=table, made_by_environments=made_by_environments)


def recipe_rows(
    recipe: Recipe, train_data: object | None = None, eval_data: object | None = None
) -> tuple[PromptRows, PromptRows | None]:
    """The rows of a recipe's `data` and `data.eval`, or of the objects in their place.

    A recipe whose environment makes the prompts may name no data: then there is a row for each prompt of a step.

    Raises:
        UserError: the data cannot be used, or they are texts where the policy acts in episodes, which are chats.
    """
    has_environment = bool(recipe.environments)
    if not recipe.data.name and train_data is None:
        train_data = [{recipe.data.prompt_column: EMPTY_PROMPT}] * recipe.train.prompts_per_step
    rows = load_rows(recipe.data, data=train_data, made_by_environments=has_environment)
    eval_rows = None
    if recipe.data.eval is not None:
        eval_rows = load_rows(
            recipe.data.eval, setting="data.eval", data=eval_data, made_by_environments=has_environment
        )
    for part in filter(None, (rows, eval_rows)):
        if recipe.episode is not None and not part.conversational:
            raise UserError(
                f"{part.where}: the prompts are texts, and tools and environments need chats; set "
                f"{part.setting}.system_prompt, or write each prompt as a list of messages"
            )
    return rows, eval_rows


def _with_prompts(table: pa.Table, name: str) -> pa.Table:
    """The table with a column of prompts, each an empty user message, if it has none."""
    if name in table.column_names:
        return table
    return table.append_column(name, pa.array([EMPTY_PROMPT] * table.num_rows))


def _template_fields(template: str, key: str) -> list[str]:
    try:
        parsed = list(Formatter().parse(template))
        nested = [entry for _, _, spec, _ in parsed if spec for entry in Formatter().parse(spec)]
    except ValueError as error:
        raise UserError(f"{key}: {error}; write {{{{ and }}}} for braces that are meant as such") from error
    fields = [field for _, field, _, _ in parsed + nested if field is not None]
    for field in fields:
        if not field or field[0] in "0123456789.[":
            raise UserError(
                f"{key}: {{{field}}} names no column; write {{column}}, and {{{{}}}} for a literal {{}}"
            )
    if not fields:
        raise UserError(f"{key}: uses no column, so every prompt would be the same; write {{column}} in it")
    return fields


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list_of_objects(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        entry = kind.value_type
        return pa.types.is_struct(entry) or pa.types.is_null(entry) or "arrow.json" in str(entry)
    return "arrow.json" in str(kind)


def _drop_none(value: Any) -> Any:
    """The value without its empty keys: Arrow gives each object all keys that any row has."""
    if isinstance(value, dict):
        return {key: _drop_none(entry) for key, entry in value.items() if entry is not None}
    return [_drop_none(entry) for entry in value] if isinstance(value, list) else value


def _decode_json(value: Any, kind: pa.DataType) -> Any:
    """Turn JSON text back into objects. `datasets` stores objects so whose keys differ in type from row to row."""
    if value is None:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        return json.loads(value) if kind.extension_name == "arrow.json" else value
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_decode_json(entry, kind.value_type) for entry in value]
    if pa.types.is_struct(kind):
        return {field.name: _decode_json(value[field.name], field.type) for field in kind}
    return value
