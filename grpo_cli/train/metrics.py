"""The numbers of a step: computed here, written to `metrics.jsonl`, named as TRL names them."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from grpo_cli.algorithm.advantages import flat_groups, nan_std, weighted_sum
from grpo_cli.algorithm.losses import LossOutput, MeasuredLoss
from grpo_cli.algorithm.transfer import wait
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError
from grpo_cli.record.metrics import RECORD, TIMES, Metrics, finite_or_none, read_metrics
from grpo_cli.rollout.engine import Completion
from grpo_cli.train.disk import writing
from grpo_cli.train.whole_files import write_text


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
    """Lengths in sampled tokens, of all completions and of those that were not cut off at their limit."""
    played = [completion for completion in completions if completion.finish_reason != "lost"] or completions
    lengths = [completion.num_sampled for completion in played]
    terminated = [one.num_sampled for one in played if one.finish_reason != "length"]
    metrics = {"completions/clipped_ratio": 1 - len(terminated) / len(played)}
    for kind, values in (("", lengths), ("terminated_", terminated or [0])):
        metrics[f"completions/mean_{kind}length"] = statistics.fmean(values)
        metrics[f"completions/min_{kind}length"] = min(values)
        metrics[f"completions/max_{kind}length"] = max(values)
    return metrics


def episode_metrics(completions: Sequence[Completion]) -> Metrics:
    """What episodes did; nothing where completions are single turns. Names beginning with `tools/` are TRL's."""
    if all(completion.messages is None for completion in completions):
        return {}
    played = [completion for completion in completions if completion.finish_reason != "lost"] or completions
    calls = sum(completion.tools.calls for completion in played)
    return {
        "rollout/turns_mean": statistics.fmean(completion.turns for completion in played),
        "rollout/lost_completions": len([one for one in completions if one.finish_reason == "lost"]),
        "tools/call_frequency": calls / len(played),
        "tools/failure_frequency": sum(one.tools.failures for one in played) / max(calls, 1),
        "tools/latency_s": sum(one.tools.seconds for one in played) / max(calls, 1),
        "tools/unknown_name_total": sum(one.tools.unknown_names for one in played),
        "tools/timeout_total": sum(one.tools.timeouts for one in played),
        "env/reset_s": statistics.fmean(one.reset_s for one in played),
    }


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line and step; NaN and infinity are written as null.

    Args:
        path: of the file.
        steps_done: the rows of these steps are kept, later ones are cut off, since they will be run again.
    """

    def __init__(self, path: Path, steps_done: int) -> None:
        self.path = path
        rows = read_metrics(path) if path.exists() else []
        self.steps_before = rows[-1]["step"] if rows else 0
        """The last step that it held."""
        kept = [row for row in rows if row["step"] <= steps_done]
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


def write_record(checkpoint: Path, metrics: Path) -> None:
    """Note in a checkpoint what `metrics.jsonl` says of the steps up to it, if there is such a file."""
    if metrics.exists():
        (checkpoint / RECORD).write_text(json.dumps(_record_of(read_metrics(metrics))), encoding="utf-8")


def check_record(checkpoint: Path, metrics: Path, note: Callable[[str], None]) -> None:
    """See that `metrics.jsonl` still says what it said when a checkpoint was written.

    Checkpoints of older versions do not tell. `note` is told of a file that is gone, and begins anew.

    Raises:
        RunError: it says something else.
    """
    if not (checkpoint / RECORD).exists():
        return
    if not metrics.exists():
        return note(f"{metrics} is gone: it begins anew after {checkpoint.name}")
    written = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    if _record_of(read_metrics(metrics)[: written["rows"]]) != written:
        rows = written["rows"]
        raise RunError(
            f"--resume: {metrics} is damaged: its first {rows} rows are not those of {checkpoint.name}; "
            "put it back from a copy; or remove it, and the run goes on without the rows of the steps before"
        )


def _record_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Number and checksum of rows, without times, by which the checkpoints of a run would differ, and without
    evaluations, which a resume adds where a lost server left one out."""
    left_out = (*TIMES, "eval_")
    timeless = [{name: value for name, value in row.items() if not name.startswith(left_out)} for row in rows]
    return {"rows": len(rows), "xxh3_128": xxhash.xxh3_128_hexdigest(json.dumps(timeless).encode())}
