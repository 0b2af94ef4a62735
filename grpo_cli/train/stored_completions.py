"""Writes a step's completions to the run's `completions/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_cli.record.completions import (
    EARLIER_ROW,
    EXTRA_COLUMN,
    POLICY_LOGPROBS,
    REWARD_COLUMN,
    ROW_COLUMNS,
    SAMPLED,
    TOKEN_TEXTS,
    completions_file,
    stored_steps,
)
from grpo_cli.reward.hooks import Plain, as_text
from grpo_cli.rollout.engine import Completion
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.disk import writing


def remove_completions_after(folder: Path, step: int) -> None:
    """Remove what an earlier start of the run wrote for steps that will be run again."""
    for stored in stored_steps(folder):
        if stored > step:
            completions_file(folder, stored).unlink()


def save_completions(
    folder: Path,
    step: int,
    rollout: Rollout,
    names: Sequence[str],
    rewards: Any,
    advantages: Any,
    *,
    extras: Mapping[str, Sequence[Plain]],
    token_texts: Sequence[Sequence[str]],
    policy_logprobs: Any,
) -> None:
    """Write one step's completions to `completions/step-00000N.parquet`; chats as JSON text.

    Token ids and their log-probabilities are what `engine: replay` trains on again.

    Args:
        folder: of the run.
        step: counted from 1.
        rollout: N completions of R rows.
        names: of the K reward functions.
        rewards: (N, K).
        advantages: (N,).
        extras: what reward functions have logged, by column N values.
        token_texts: of the N completions' own tokens.
        policy_logprobs: (R, T) when they were trained on last, NaN where they were not.
    """
    batch = rollout.scoring_batch()
    last = [rows[-1] for rows in rollout.rows_by_completion]
    columns: dict[str, Any] = {
        "step": [step] * len(rollout.completions),
        "prompt": [p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in batch.prompts],
        "completion": [_as_text(completion) for completion in rollout.completions],
        "tokens": [completion.num_sampled for completion in rollout.completions],
        "finish_reason": [completion.finish_reason for completion in rollout.completions],
        "advantage": advantages.tolist(),
    }
    columns |= {REWARD_COLUMN.format(name=name): rewards[:, index].tolist() for index, name in enumerate(names)}
    columns |= {EXTRA_COLUMN.format(name=name): _of_one_type(values) for name, values in extras.items()}
    for name, (key, kind) in ROW_COLUMNS.items():
        columns[name] = pa.array([vars(row)[key] for row in last], kind)
    columns[TOKEN_TEXTS] = pa.array(token_texts, pa.list_(pa.string()))
    last_places = [end - 1 for end in accumulate(map(len, rollout.rows_by_completion))]
    of_last = zip(policy_logprobs[last_places].numpy(), last, strict=True)
    trained_on = [values[: len(row.token_ids)] for values, row in of_last]
    columns[POLICY_LOGPROBS] = pa.array(trained_on, pa.list_(pa.float32()), from_pandas=True)  # NaN as null
    if any(completion.messages is not None for completion in rollout.completions):
        columns["sampled"] = pa.array([row.sampled for row in last], SAMPLED)
        columns["turns"] = [completion.turns for completion in rollout.completions]
        columns["tool_calls"] = [completion.tools.calls for completion in rollout.completions]
        earlier = [[vars(row) for row in completion.earlier] for completion in rollout.completions]
        columns["earlier"] = pa.array(earlier, pa.list_(EARLIER_ROW))
    path = completions_file(folder, step)
    path.parent.mkdir(exist_ok=True)
    with writing(path):
        pq.write_table(pa.table(columns), path, compression="zstd", write_page_checksum=True)


def _of_one_type(values: Sequence[Plain]) -> Sequence[Plain]:
    """Values as a table can hold them: numbers of two kinds as floats, any other mixture as text."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) < 2:
        return values
    make = float if kinds == {int, float} else as_text
    return [None if value is None else make(value) for value in values]


def _as_text(completion: Completion) -> str:
    """A completion's text, or as JSON the conversation that it is."""
    if completion.messages is None:
        return completion.text
    return json.dumps(completion.messages, ensure_ascii=False, default=str)
