"""The engine that generates nothing: it gives the completions that an earlier run has stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_cli.errors import RunError, UserError
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey

NEEDED_COLUMNS = ("prompt_ids", "completion_ids", "logprobs", "finish_reason", "completion")
STEP_PLACE, PROMPT_PLACE = 2, 3
"""Of a training rollout's key: (seed, stream, step, prompt)."""


def completions_file(folder: Path, step: int) -> Path:
    """Where a run stores the completions of a step, counted from 1."""
    return folder / "completions" / f"step-{step:06d}.parquet"


def check_stored(folder: Path, steps: int) -> None:
    """See that a run has stored what training so many steps on it needs.

    Raises:
        UserError: it has not stored as many steps, or an older version wrote them without token ids.
    """
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
        prompts: Sequence[Sequence[int]],
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

    def _group(self, prompt: Sequence[int], step: int, place: int, size: int) -> list[Completion]:
        rows = self._rows(step)[place * size : (place + 1) * size]
        if len(rows) < size or any(row["prompt_ids"] != list(prompt) for row in rows):
            path = completions_file(self._folder, step)
            raise RunError(
                f"generation.replay: {path} does not hold {size} completions of prompt {place} of step {step}; "
                "data, train.seed, prompts_per_step and num_generations must be that run's"
            )
        return [
            Completion(row["completion_ids"], row["logprobs"], row["finish_reason"], row["completion"])
            for row in rows
        ]

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
    table = pq.read_table(path, columns=list(NEEDED_COLUMNS), page_checksum_verification=True)
    table.validate(full=True)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
