"""`metrics.jsonl`: the numbers of a run, a line a step. Names and readers; no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_cli.errors import RunError

Metrics = dict[str, float]

METRICS, RECORD = "metrics.jsonl", "record.json"
"""The file of a run, and the file of a checkpoint that says what that held."""

_EPISODE_TIMES = ("tools/latency_s", "env/reset_s", "env/reward_s")
TIMES = ("time/", "tokens_per_second", *_EPISODE_TIMES, *(f"eval_{name}" for name in _EPISODE_TIMES))
"""How the names of those metrics begin that differ from run to run."""


def finite_or_none(metrics: Metrics) -> dict[str, float | None]:
    """Metrics as JSON can hold them: NaN and infinities become null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a killed process left unfinished is left out.

    Raises:
        RunError: a line is damaged.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError("a row has the number of its step")
        except (ValueError, KeyError, TypeError) as error:
            what = "is damaged, and no row of metrics; mend or remove the line, then --resume"
            raise RunError(f"{path}:{number}: {what}") from error
        rows.append(row)
    return rows


def mean_reward(rows: Sequence[dict[str, Any]]) -> float:
    """Mean of the `reward` of some metrics rows, those without one left out."""
    values = [row["reward"] for row in rows if row["reward"] is not None]
    return sum(values) / len(values) if values else float("nan")
