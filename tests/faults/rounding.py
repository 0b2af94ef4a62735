"""How a run on a vLLM server, or one of episodes, must end: the standard, and what of it is exact.

Its tokens follow from the weights and each request's seed, but the engine's log-probabilities differ in the last
digits with what else it computed meanwhile: requests, or answers, come when they come. They are noted, not trained
on. So the files of model and optimizer are
compared byte for byte, the completions token for token, and what the engine reports within a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from grpo_cli.record.metrics import TIMES, read_metrics

REPORTED = ("sampling/", "sync/")
"""Metrics of what the server reports, and of what it was sent, which is more after it was lost."""

TOLERANCE = 1e-3
"""Of log-probabilities: vLLM's against those of the run undisturbed, and against the policy's own, which those of
any other version miss by more."""

NOT_OF_THE_POLICY = ("record.json", "manifest.json")
"""Checksums of metrics, which hold what the server reported."""


def rounded_difference(run: Path, whole: Path) -> str | None:
    """What is wrong with a run that was hit, or whose server was, against the undisturbed one."""
    return next((wrong for wrong in _differences(run, whole) if wrong), None)


def _differences(run: Path, whole: Path) -> Iterator[str | None]:
    rows, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run, whole))
    steps = [row["step"] for row in rows]
    if steps != [row["step"] for row in expected]:
        yield f"metrics.jsonl has the steps {steps}"
    for row, theirs in zip(rows, expected, strict=True):
        yield _of_metrics(row, theirs)
        yield _of_completions(run, whole, row["step"])
    (last,) = whole.glob("checkpoint-*")
    for folder in (whole / "final", last):
        for path in folder.rglob("*"):
            same = run / path.relative_to(whole)
            if path.name not in NOT_OF_THE_POLICY and path.read_bytes() != (
                same.read_bytes() if same.exists() else b""
            ):
                yield f"{path.relative_to(whole)} has other bytes"
    left = [path.name for path in run.glob(".*.partial")]
    yield f"left over: {left}" if left else None


def _of_metrics(row: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    for name, value in theirs.items():
        if not name.startswith((*TIMES, *REPORTED)) and row.get(name) != value:
            return f"step {row['step']}: {name} is {row.get(name)}, was {value}"
    drift = row["sampling/sampling_logp_difference/max"]
    if not drift < TOLERANCE:
        return f"step {row['step']}: {drift} between server and policy: it has generated with other weights"
    return None


def _of_completions(run: Path, whole: Path, step: int) -> str | None:
    name = f"completions/step-{step:06d}.parquet"
    table, theirs = (pq.read_table(folder / name).to_pydict() for folder in (run, whole))
    for column, values in theirs.items():
        if column != "logprobs" and table[column] != values:
            return f"{name}: other values of {column}"
    logprobs, expected = (np.concatenate(list(map(np.asarray, one["logprobs"]))) for one in (table, theirs))
    if not np.array_equal(np.isnan(logprobs), np.isnan(expected)):
        return f"{name}: other tokens have log-probabilities"
    difference = np.nanmax(np.abs(logprobs - expected))
    return None if difference < TOLERANCE else f"{name}: log-probabilities differ by {difference}"
