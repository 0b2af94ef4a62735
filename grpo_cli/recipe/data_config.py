"""The sections `data` and `data.eval`: where prompts come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from grpo_cli.recipe.paths import possible_path
from grpo_cli.recipe.section import Section

DATA_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class EvalDataConfig(Section):
    _paths = field_validator("name")(possible_path)

    name: str = Field(min_length=1)
    """Hub id, a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder of them, or `module:factory`."""
    params: dict[str, Any] = {}
    """Keyword arguments of `module:factory`."""
    config: str | None = None
    """Name of the Hub dataset's configuration."""
    split: str = "train"
    """Split of a Hub dataset, or of a folder whose files are named after their splits."""
    prompt_column: str = "prompt"
    """Column that holds the prompt: a string, or a list of chat messages."""
    columns: dict[str, str] = {}
    """Renames, old name to new: `{question: prompt}`."""
    system_prompt: str | None = None
    """System message put before every prompt; string prompts become one-message chats."""
    prompt_template: str | None = None
    """Python format string over the row's columns that makes the prompt: `"Question: {question}"`."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens, chat template included; no limit if empty."""
    long_prompts: Literal["drop", "truncate_left", "error"] = "drop"
    """What happens to a prompt over `max_prompt_tokens`."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""


class DataConfig(EvalDataConfig):
    name: str = ""
    """Hub id, a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder of them, or `module:factory`. Empty only
    where an `episode.environment` makes the prompts."""
    shuffle: bool = True
    """Visit the prompts in a new order each epoch, drawn from `train.seed`."""
    eval: EvalDataConfig | None = None
    """Prompts that are held out for evaluation; keys as in `data`, none of which are inherited."""
