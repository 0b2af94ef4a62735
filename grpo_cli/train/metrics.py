"""The numbers of a step: computed here, written to `metrics.jsonl`, named as TRL names them."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grpo_cli.algorithm.advantages import flat_groups, nan_std, weighted_sum
from grpo_cli.algorithm.losses import LossOutput, MeasuredLoss
from grpo_cli.algorithm.transfer import wait
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError
from grpo_cli.rollout.engine import Completion
from grpo_cli.train.disk import writing
from grpo_cli.train.whole_files import write_text

Metrics = dict[str, float]


class MetricMeans:
    """Combines the metrics of micro-batches: means by their weights, the others by extremes.

    Numbers are read from the device at the end, all at once.
    """

    def __init__(self) -> None:
        self._unread: list[Callable[[], tuple[Metrics, Metrics]]] = []
        """Metrics and the weights of the means among them, in the order in which they came."""
        self._sums: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)
        self._extremes: Metrics = {}

    def add(self, output: LossOutput | MeasuredLoss) -> None:
        if isinstance(output, MeasuredLoss):
            self._unread.append(output.measured.on_host().summary)
        else:
            numbers = output.metrics, output.weights
            self._unread.append(lambda: numbers)

    def add_value(self, name: str, value: float, weight: float = 1.0) -> None:
        self._unread.append(lambda: ({name: value}, {name: weight}))

    def include(self, later: MetricMeans) -> None:
        """Add what another has been given, as if it came now."""
        self._unread += later._unread

    def _read(self) -> None:
        wait()
        for numbers in self._unread:
            metrics, weights = numbers()
            for name, weight in weights.items():
                self._sums[name] += metrics[name] * weight
                self._weights[name] += weight
            self._add_extremes({name: value for name, value in metrics.items() if name not in weights})
        self._unread.clear()

    def _add_extremes(self, values: Metrics) -> None:
        for name, value in values.items():
            pick = min if name.endswith(("_min", "/min")) else max
            self._extremes[name] = pick(self._extremes.get(name, value), value)

    def result(self, ranks: Ranks) -> Metrics:
        """The metrics of all micro-batches of all ranks."""
        self._read()
        joined = MetricMeans()
        for sums, weights, extremes in ranks.gather((dict(self._sums), dict(self._weights), self._extremes)):
            for name, total in sums.items():
                joined._sums[name] += total
                joined._weights[name] += weights[name]
            joined._add_extremes(extremes)
        means = {name: total / max(joined._weights[name], 1e-12) for name, total in joined._sums.items()}
        return means | joined._extremes


class StepClock:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[phase] += time.perf_counter() - start

    def reset(self) -> None:
        self.seconds.clear()

    def result(self, num_tokens: int) -> Metrics:
        """`time/<phase>` and prompt and completion tokens per second."""
        total = sum(self.seconds.values())
        times = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        return times | {"time/step": total, "tokens_per_second": num_tokens / max(total, 1e-9)}


def reward_metrics(
    rewards: torch.Tensor, names: Sequence[str], weights: Sequence[float], num_generations: int
) -> Metrics:
    """Mean and spread of the rewards, per function and weighted.

    Args:
        rewards: (N, K), NaN where a function did not apply.
        names: of the K functions.
        weights: of the K functions.
        num_generations: G.
    """
    metrics: Metrics = {}
    for index, name in enumerate(names):
        metrics[f"rewards/{name}/mean"] = rewards[:, index].nanmean().item()
        metrics[f"rewards/{name}/std"] = _std_or_nan(rewards[:, index])
    total = weighted_sum(rewards, weights)  # (N,)
    flat = flat_groups(rewards, weights, num_generations)  # (P,)
    metrics["reward"] = total.nanmean().item()
    metrics["reward_std"] = _std_or_nan(total)
    metrics["frac_reward_zero_std"] = flat.double().mean().item()
    return metrics


def _std_or_nan(values: torch.Tensor) -> float:
    return nan_std(values, dim=0).item() if (~values.isnan()).any() else math.nan


def completion_metrics(completions: Sequence[Completion]) -> Metrics:
    """Lengths in tokens, of all completions and of those that ended by themselves."""
    lengths = [len(completion.token_ids) for completion in completions]
    terminated = [len(c.token_ids) for c in completions if c.finish_reason == "stop"]
    metrics = {"completions/clipped_ratio": 1 - len(terminated) / len(completions)}
    for kind, values in (("", lengths), ("terminated_", terminated or [0])):
        metrics[f"completions/mean_{kind}length"] = statistics.fmean(values)
        metrics[f"completions/min_{kind}length"] = min(values)
        metrics[f"completions/max_{kind}length"] = max(values)
    return metrics


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line and step; NaN and infinity are written as null.

    Args:
        path: of the file.
        steps_done: the rows of these steps are kept, later ones are cut off, since they will be run again.
    """

    def __init__(self, path: Path, steps_done: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= steps_done] if path.exists() else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, metrics: Metrics) -> None:
        row = finite_or_none(metrics)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def amend(self, metrics: Metrics) -> None:
        """Add to the last row."""
        rows = read_metrics(self.path)
        rows[-1] |= finite_or_none(metrics)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


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
