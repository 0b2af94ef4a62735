"""`completions/`: what a run has said, a parquet file a step, a row a completion. Names and readers; no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_cli.errors import RunError

ROW_COLUMNS = {
    "prompt_ids": ("prompt_ids", pa.list_(pa.int32())),
    "completion_ids": ("token_ids", pa.list_(pa.int32())),
    "logprobs": ("logprobs", pa.list_(pa.float32())),
}
"""By column: the field of a completion's last row that it holds, and its type."""

TOKEN_TEXTS, POLICY_LOGPROBS = "token_texts", "policy_logprobs"
"""Columns of lists with an entry for each of the completion's last row of tokens: their texts, and their
log-probabilities under the policy when they were last trained on, null where they were not."""

REWARD_COLUMN = "reward/{name}"
"""By name of the reward function."""

EXTRA_COLUMN = "extra/{name}"
"""By name that a reward function has given to `log_extra`."""

SAMPLED = pa.list_(pa.bool_())
TOKEN_COLUMNS = {*ROW_COLUMNS, TOKEN_TEXTS, POLICY_LOGPROBS, "sampled", "earlier"}
"""Columns with an entry for each token. A step of 1.5 million tokens takes 480 MB with them and 150 MB without."""

EARLIER_ROW = pa.struct([*ROW_COLUMNS.values(), ("sampled", SAMPLED)])


def completions_file(folder: Path, step: int) -> Path:
    """Where a run stores the completions of a step, counted from 1."""
    return folder / "completions" / f"step-{step:06d}.parquet"


def stored_steps(folder: Path) -> list[int]:
    """The steps whose completions a run has stored, in order."""
    names = (path.stem.removeprefix("step-") for path in (folder / "completions").glob("step-*.parquet"))
    return sorted(int(name) for name in names if name.isdecimal())  # others are no files of a run


@dataclass(frozen=True)
class StoredCompletion:
    """A row of `completions/`. What an older version did not store is empty."""

    step: int
    """Counted from 1."""
    group: int
    """Of the step, counted from 0."""
    sample: int
    """Place in its group."""
    prompt: str | list[dict[str, Any]]
    """A text, or a conversation."""
    completion: str | list[dict[str, Any]]
    """A text, or of an episode the messages after the prompt."""
    num_sampled: int
    """Tokens that the policy sampled."""
    finish_reason: str
    advantage: float
    rewards: dict[str, float | None]
    """By reward function; None where it did not apply."""
    extras: dict[str, Any]
    """What reward functions gave to `log_extra`, by name."""
    token_ids: list[int]
    """Of its last row: all of it, unless a chat template wrote the history anew. The lists below are as long."""
    token_texts: list[str]
    logprobs: list[float | None]
    """Under what sampled them; None where that is not known."""
    policy_logprobs: list[float | None]
    """Under the policy when it was last trained on them; None where it was not."""
    sampled: list[bool]
    """Whether the policy sampled it: what a tool or an environment said is read only."""

    @property
    def text(self) -> str:
        """What the policy said; of an episode its turns, one after the other."""
        if isinstance(self.completion, str):
            return self.completion
        return "\n".join(str(one["content"] or "") for one in self.completion if one["role"] == "assistant")


def read_completions(
    folder: Path, step: int, group_size: int, *, with_tokens: bool = True, places: Sequence[int] | None = None
) -> list[StoredCompletion]:
    """The completions that a run has stored for a step, group by group.

    Args:
        folder: of the run.
        step: counted from 1.
        group_size: the recipe's `generation.num_generations`.
        with_tokens: if not, the lists of tokens are left in the file, and are empty.
        places: of the completions in the step, counted from 0; all if not given.

    Raises:
        RunError: the file is not there, damaged, or not of completions.
    """
    path = completions_file(folder, step)
    try:
        # pq.read_table would import pandas, which takes longer than reading.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = [name for name in file.schema_arrow.names if with_tokens or name not in TOKEN_COLUMNS]
            table = file.read(columns=names)
        table.validate(full=True)
        if places is None:
            places = range(table.num_rows)
        else:  # table.take would import pandas, too
            table = pa.concat_tables([table.slice(0, 0), *(table.slice(place, 1) for place in places)])
        rows = table.to_pylist()
        return [_completion(row, *divmod(place, group_size)) for place, row in zip(places, rows, strict=True)]
    except KeyError as error:
        raise RunError(f"{path} holds no completions of a run: it has no column {error}") from error
    except (OSError, pa.ArrowException, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _completion(row: dict[str, Any], group: int, sample: int) -> StoredCompletion:
    is_episode = "turns" in row
    token_ids = row.get("completion_ids") or []
    nothing = [None] * len(token_ids)
    return StoredCompletion(
        step=row["step"],
        group=group,
        sample=sample,
        prompt=_prompt(row["prompt"]),
        completion=json.loads(row["completion"]) if is_episode else row["completion"],
        num_sampled=row["tokens"],
        finish_reason=row["finish_reason"],
        advantage=row["advantage"],
        rewards={name: _number(score) for name, score in _named(row, REWARD_COLUMN).items()},
        extras=_named(row, EXTRA_COLUMN),
        token_ids=token_ids,
        token_texts=row.get(TOKEN_TEXTS) or [],
        logprobs=[_number(value) for value in row.get("logprobs") or nothing],
        policy_logprobs=[_number(value) for value in row.get(POLICY_LOGPROBS) or nothing],
        sampled=row.get("sampled") or [True] * len(token_ids),
    )


def _prompt(stored: str) -> str | list[dict[str, Any]]:
    """A prompt as it was: conversations are stored as JSON, texts as they are."""
    try:
        messages = json.loads(stored)
    except (ValueError, RecursionError):  # a text, and one may begin with thousands of brackets
        return stored
    is_chat = isinstance(messages, list) and all(isinstance(one, dict) and "role" in one for one in messages)
    return messages if is_chat and messages else stored


def _named(row: dict[str, Any], column: str) -> dict[str, Any]:
    start = column.format(name="")
    return {name.removeprefix(start): value for name, value in row.items() if name.startswith(start)}


def _number(value: float | None) -> float | None:
    """None for NaN, too."""
    return value if value == value else None
