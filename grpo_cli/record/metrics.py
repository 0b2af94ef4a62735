"""`metrics.jsonl`: the numbers of a run, a line a step. Names and readers; no torch."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from grpo_cli.errors import RunError

Metrics = dict[str, float]

METRICS, RECORD = "metrics.jsonl", "record.json"
"""The file of a run, and the file of a checkpoint that says what that held."""

_EPISODE_TIMES = ("tools/latency_s", "env/reset_s", "env/reward_s")
TIMES = ("time/", "tokens_per_second", *_EPISODE_TIMES, *(f"eval_{name}" for name in _EPISODE_TIMES))
"""How the names of those metrics begin that differ from run to run."""

_RESERVED = (*TIMES, "eval_", "pass@")
_OWN = re.compile(
    r"step|epoch|num_tokens|loss|grad_norm|learning_rate|entropy|kl|reward|reward_std|frac_reward_zero_std"
    r"|frac_groups_skipped|rewards/.*/(mean|std)|completions/(clipped_ratio|(mean|min|max)_(terminated_)?length)"
    r"|clip_ratio/(low_mean|low_min|high_mean|high_max|region_mean)|cispo_clip_ratio|vespo/phi_seq_mean"
    r"|sampling/(sampling_logp_difference|importance_sampling_ratio)/(min|mean|max)|train/skipped_steps"
    r"|tools/(call_frequency|failure_frequency|unknown_name_total|timeout_total)|sync/bytes"
    r"|rollout/(turns_mean|lost_completions)|resample/(rounds|generated_groups)"
)


def is_own_metric(name: str) -> bool:
    """Whether a run itself may write a metric of this name, or would take one for a time or an evaluation."""
    return name.startswith(_RESERVED) or _OWN.fullmatch(name) is not None


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
            if any(not isinstance(value, int | float | None) for value in row.values()):
                raise TypeError("a row has nothing but numbers")
        except (ValueError, KeyError, TypeError) as error:
            what = "is damaged, and no row of metrics; mend or remove the line; a run then goes on with --resume"
            raise RunError(f"{path}:{number}: {what}") from error
        rows.append(row)
    return rows
