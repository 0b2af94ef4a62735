"""The engine that generates nothing: it gives the completions that an earlier run has stored."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_cli.data.prompts import Prompt
from grpo_cli.errors import RunError, UserError
from grpo_cli.record.completions import REWARD_COLUMN, completions_file
from grpo_cli.reward.registry import ENVIRONMENTS, RewardFunction
from grpo_cli.rollout.engine import Completion, OnGroup, SampledRow, SampleKey

NEEDED_COLUMNS = ("prompt", "prompt_ids", "completion_ids", "logprobs", "finish_reason", "completion")
EPISODE_COLUMNS = ("sampled", "turns", "earlier")
"""That runs of episodes have, too."""

STEP_PLACE, PROMPT_PLACE = 2, 3
"""Of a training rollout's key: (seed, stream, step, prompt)."""


def check_stored(folder: Path, steps: int, functions: Sequence[RewardFunction] = ()) -> None:
    """See that a run has stored what training so many steps on it needs.

    Args:
        folder: of the run.
        steps: of training.
        functions: the reward functions; what those say that look at environments must be stored.

    Raises:
        UserError: it has not stored as many steps, an older version wrote them without token ids, or it had other
            rewards.
    """
    rewards = [REWARD_COLUMN.format(name=one.name) for one in functions if one.asks_for_environments]
    for step in (1, steps):
        path = completions_file(folder, step)
        if not path.is_file():
            raise UserError(
                f"generation.replay: {path} is not there; it needs a run that has stored {steps} steps, "
                "or a smaller train.max_steps"
            )
        try:
            names = pq.read_schema(path).names
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"generation.replay: {path} cannot be read: {error}") from error
        missing = [name for name in NEEDED_COLUMNS if name not in names]
        if missing:
            raise UserError(f"generation.replay: {path} has no column {missing[0]}; an older version wrote it")
        unknown = [name for name in rewards if name not in names]
        if unknown:
            raise UserError(
                f"generation.replay: {path} has no column {unknown[0]}, and there are no environments to tell it "
                "from; take the environments and rewards of that run"
            )


def as_stored(functions: Sequence[RewardFunction]) -> list[RewardFunction]:
    """The reward functions of a replay: its environments are gone, so what looks at them says what is stored."""
    given = frozenset({ENVIRONMENTS})
    return [
        replace(one, call=StoredReward(one.name), accepts=given, required=given, timeout_s=None)
        if one.asks_for_environments
        else one
        for one in functions
    ]


class StoredReward:
    """A reward function that gives what another run has stored.

    Args:
        name: of the reward.
    """

    def __init__(self, name: str) -> None:
        self._column = REWARD_COLUMN.format(name=name)

    def __call__(self, environments: Sequence[dict[str, float]]) -> list[float | None]:
        """The reward of each completion, in whose environment's place are its stored rewards by column."""
        scores = [stored[self._column] for stored in environments]
        return [None if score is None or math.isnan(score) else score for score in scores]


class ReplayEngine:
    """Gives each group the completions, token ids and log-probabilities that a run has stored for it.

    Args:
        folder: of the run.
        steps: that will be asked for.

    Raises:
        UserError: as `check_stored`.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        check_stored(folder, steps)
        self._folder = folder
        self._read: tuple[int, list[dict[str, Any]]] = (-1, [])

    def update_weights(self, version: int) -> int:
        """See `RolloutEngine.update_weights`."""
        return 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`; for the rollouts of training alone.

        Raises:
            RunError: the run has stored other prompts, or groups of another size.
        """
        groups = []
        for index, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            groups.append(self._group(prompt, key[STEP_PLACE] + 1, key[PROMPT_PLACE], num_generations))
            if on_group is not None:
                on_group(index, groups[index])
        return groups

    def _group(self, prompt: Prompt, step: int, place: int, size: int) -> list[Completion]:
        rows = self._rows(step)[place * size : (place + 1) * size]
        completions = [_completion(row, prompt) for row in rows]
        if len(rows) < size or not all(_is_of(completion, prompt) for completion in completions):
            path = completions_file(self._folder, step)
            raise RunError(
                f"generation.replay: {path} does not hold {size} completions of prompt {place} of step {step}; "
                "data, train.seed, prompts_per_step and num_generations must be that run's"
            )
        return completions

    def _rows(self, step: int) -> list[dict[str, Any]]:
        if self._read[0] != step:
            path = completions_file(self._folder, step)
            try:
                self._read = step, _rows_of(path)
            except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
                raise RunError(f"generation.replay: {path} cannot be read: {error}") from error
        return self._read[1]

    def release_memory(self) -> None:
        """See `RolloutEngine.release_memory`."""

    def close(self) -> None:
        """See `RolloutEngine.close`."""


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """A file's rows, if its pages have the checksums with which they were written."""
    names, rewards = pq.read_schema(path).names, REWARD_COLUMN.format(name="")
    wanted = (*NEEDED_COLUMNS, *EPISODE_COLUMNS)
    stored = [name for name in names if name in wanted or name.startswith(rewards)]
    table = pq.read_table(path, columns=stored, page_checksum_verification=True)
    table.validate(full=True)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _is_of(completion: Completion, prompt: Prompt) -> bool:
    """Whether a completion followed this prompt, or what an environment has made of it by adding to its end."""
    if completion.prompt is None:
        return completion.prompt_ids is None
    stored, given = completion.prompt.content, prompt.content
    assert not isinstance(stored, str)  # episodes are chats
    assert not isinstance(given, str)
    last, own = stored[-1]["content"], given[-1]["content"]
    return stored[:-1] == given[:-1] and last[: len(own)] == own


def _completion(row: dict[str, Any], prompt: Prompt) -> Completion:
    """The completion that a row of the table holds, after this prompt."""
    sampled = row.get("sampled")
    single = Completion(row["completion_ids"], row["logprobs"], row["finish_reason"], row["completion"], sampled)
    if "turns" not in row:
        return single if row["prompt_ids"] == prompt.token_ids else replace(single, prompt_ids=row["prompt_ids"])
    content, prompt_ids = json.loads(row["prompt"]), row["prompt_ids"]
    earlier = tuple(SampledRow(**entry) for entry in row["earlier"])
    first = earlier[0].prompt_ids if earlier else prompt_ids
    messages = json.loads(row["completion"])
    return replace(
        single,
        text="\n".join(str(one["content"]) for one in messages if one["role"] == "assistant"),
        messages=messages,
        turns=row["turns"],
        prompt=replace(prompt, content=content, token_ids=first),
        prompt_ids=prompt_ids if earlier else None,
        earlier=earlier,
        environment={name: score for name, score in row.items() if name.startswith(REWARD_COLUMN.format(name=""))},
    )
