"""Metrics do not depend on how a step is split, equal TRL's, and survive a kill."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_cli.algorithm.losses import LossOutput
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError
from grpo_cli.record.metrics import METRICS, RECORD, read_metrics
from grpo_cli.rollout.engine import Completion
from grpo_cli.train.metrics import (
    MetricMeans,
    MetricsFile,
    StepClock,
    check_record,
    completion_metrics,
    reward_metrics,
    write_record,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_advantages.json").read_text())["cases"]
NAN = math.nan


def output(metrics: dict[str, float], weights: dict[str, float]) -> LossOutput:
    return LossOutput(torch.zeros(()), metrics, weights)


@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=0, max_size=5), min_size=1, max_size=4).filter(
        lambda parts: any(parts)
    )
)
def test_means_over_parts_are_the_mean_of_the_whole(parts: list[list[float]]) -> None:
    means = MetricMeans()
    for part in parts:
        mean = sum(part) / len(part) if part else 0.0
        means.add(output({"kl": mean}, {"kl": float(len(part))}))
    whole = [value for part in parts for value in part]
    assert means.result(Ranks())["kl"] == pytest.approx(sum(whole) / len(whole), abs=1e-9)


def test_minima_and_maxima_are_those_of_all_parts() -> None:
    means = MetricMeans()
    means.add(output({"clip_ratio/low_min": 0.2, "clip_ratio/high_max": 0.1, "kl": 1.0}, {"kl": 3.0}))
    means.add(output({"clip_ratio/low_min": 0.1, "clip_ratio/high_max": 0.4, "kl": 5.0}, {"kl": 1.0}))
    means.add(output({"clip_ratio/low_min": 0.3, "clip_ratio/high_max": 0.0, "kl": 0.0}, {"kl": 0.0}))
    assert means.result(Ranks()) == {"clip_ratio/low_min": 0.1, "clip_ratio/high_max": 0.4, "kl": 2.0}


def test_values_of_optimizer_steps_count_alike_and_nothing_at_all_is_zero() -> None:
    means = MetricMeans()
    means.add_value("loss", 1.0)
    means.add_value("loss", 3.0)
    means.add(output({"entropy": 0.0}, {"entropy": 0.0}))
    assert means.result(Ranks()) == {"loss": 2.0, "entropy": 0.0}


def test_what_one_includes_of_another_counts_as_if_it_had_been_added() -> None:
    means, part, all_at_once = MetricMeans(), MetricMeans(), MetricMeans()
    for index, value in enumerate((0.1, 0.7, 0.4)):
        one = output({"loss": value, "x/max": value}, {"loss": 1.0 + index})
        (means if index == 0 else part).add(one)
        all_at_once.add(one)
    means.include(part)
    assert means.result(Ranks()) == all_at_once.result(Ranks())


class OneOfMany(Ranks):
    """Remembers what this rank gives, and gets what all have given."""

    def __init__(self, said: list[Any], gets: Sequence[Any] = ()) -> None:
        super().__init__()
        self.said, self.gets = said, gets

    def gather(self, value: Any) -> list[Any]:
        self.said.append(value)
        return list(self.gets)


@given(st.lists(st.lists(st.integers(0, 8), max_size=4), min_size=1, max_size=4))
def test_the_result_is_the_same_however_micro_batches_are_spread_over_ranks(parts: list[list[int]]) -> None:
    def add(means: MetricMeans, value: int) -> None:
        extremes = {"clip_ratio/low_min": float(-value), "clip_ratio/high_max": float(value)}
        means.add(output({"kl": float(value)} | extremes, {"kl": float(value % 3)}))

    whole, spread = MetricMeans(), [MetricMeans() for _ in parts]
    for means, part in zip(spread, parts, strict=True):
        for value in part:
            add(whole, value)
            add(means, value)
    said: list[Any] = []
    for means in spread:
        means.result(OneOfMany(said))
    expected = whole.result(Ranks())
    for means in spread:
        assert means.result(OneOfMany([], said)) == expected, "on every rank"


@pytest.mark.parametrize("case", GOLDEN)
def test_reward_metrics_equal_trl(case: dict[str, Any]) -> None:
    rewards = torch.tensor(
        [[NAN if value is None else value for value in column] for column in case["rewards"]], dtype=torch.float64
    ).T
    names = [f"r{index}" for index in range(rewards.shape[1])]
    metrics = reward_metrics(rewards, names, case["weights"], case["num_generations"])
    expected = {name: NAN if value is None else value for name, value in case["metrics"].items()}
    if case["scale_rewards"] == "batch" or case["aggregation"] == "normalize_then_sum":
        # TRL asks here whether the standard deviation of the whole batch is zero. Ours is the share of groups in
        # which all completions got the same reward, whatever the rewards are scaled by: those teach nothing.
        weights = torch.tensor(case["weights"], dtype=torch.float64)
        flat = []
        for group in rewards.view(-1, case["num_generations"], len(weights)):
            scored = group[~group.isnan().all(dim=1)].nan_to_num() @ weights
            flat.append(float(len(scored) < 2 or (scored.max() - scored.min()).item() < 1e-8))
        expected["frac_reward_zero_std"] = sum(flat) / len(flat)
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-5, nan_ok=True)


def test_a_function_that_never_applied_has_no_mean() -> None:
    rewards = torch.tensor([[1.0, NAN], [3.0, NAN]], dtype=torch.float64)
    metrics = reward_metrics(rewards, ["a", "b"], [1.0, 1.0], 2)
    assert metrics["rewards/a/mean"] == metrics["reward"] == 2.0
    assert math.isnan(metrics["rewards/b/mean"])
    assert math.isnan(metrics["rewards/b/std"])
    nothing = reward_metrics(rewards[:, 1:], ["b"], [1.0], 2)
    assert math.isnan(nothing["reward"])
    assert math.isnan(nothing["reward_std"])


def completion(length: int, reason: Any) -> Completion:
    return Completion([1] * length, [0.0] * length, reason, "")


def test_lengths_of_all_and_of_those_that_ended_by_themselves() -> None:
    metrics = completion_metrics([completion(3, "stop"), completion(8, "length"), completion(5, "stop")])
    assert metrics == pytest.approx(
        {
            "completions/clipped_ratio": 1 / 3,
            "completions/mean_length": 16 / 3,
            "completions/min_length": 3,
            "completions/max_length": 8,
            "completions/mean_terminated_length": 4,
            "completions/min_terminated_length": 3,
            "completions/max_terminated_length": 5,
        }
    )
    none_ended = completion_metrics([completion(8, "length")])
    assert none_ended["completions/clipped_ratio"] == 1
    assert none_ended["completions/mean_terminated_length"] == 0


def test_the_clock_adds_up_phases_and_counts_a_phase_that_failed() -> None:
    clock = StepClock()
    with clock("generate"):
        pass
    with pytest.raises(KeyError), clock("train"):
        raise KeyError
    with clock("generate"):
        pass
    metrics = clock.result(num_tokens=100)
    assert set(metrics) == {"time/generate", "time/train", "time/step", "tokens_per_second"}
    assert metrics["time/step"] == pytest.approx(metrics["time/generate"] + metrics["time/train"])
    assert metrics["tokens_per_second"] == pytest.approx(100 / max(metrics["time/step"], 1e-9))


def test_rows_go_to_the_file_as_they_come_and_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    assert path.read_text() == ""
    file.append({"step": 1, "reward": 0.25, "kl": NAN, "ratio": math.inf, "low": -math.inf})
    row = {"step": 1, "reward": 0.25, "kl": None, "ratio": None, "low": None}
    assert [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()] == [row]
    assert read_metrics(path) == [row]


def test_a_resumed_file_keeps_the_rows_up_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.append({"step": step, "reward": step / 3})
    before = path.read_bytes().splitlines(keepends=True)
    resumed = MetricsFile(path, 3)
    assert path.read_bytes() == b"".join(before[:3])
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    resumed.append({"step": 4, "reward": 4 / 3})
    assert path.read_bytes() == b"".join(before[:4])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", [1, 5, -1])
def test_a_last_line_that_a_kill_left_unfinished_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.append({"step": step})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:cut])
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    MetricsFile(path, 3).append({"step": 3})
    assert path.read_text() == "".join(lines)


@pytest.mark.parametrize(
    "damaged", [b'{"step": 2, "loss": 1', b"\xff", b"[]", b"null", b'{"stop": 2}', b'{"step": 2, "kl": "no"}', b""]
)
def test_a_damaged_row_is_named_and_not_dropped(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 3}\n')
    with pytest.raises(
        RunError, match=r"metrics\.jsonl:2: is damaged.*mend or remove the line; a run then goes on with --resume"
    ):
        MetricsFile(path, 3)
    assert damaged in path.read_bytes()


def test_a_checkpoint_knows_what_the_rows_before_it_say(tmp_path: Path) -> None:
    notes: list[str] = []
    path = tmp_path / METRICS
    write_record(tmp_path, path)
    check_record(tmp_path, path, notes.append)
    assert not (tmp_path / RECORD).exists(), "as in checkpoints of older versions"
    rows = [{"step": step, "reward": step / 3, "time/step": 0.1} for step in (1, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_record(tmp_path, path)
    with path.open("a") as file:
        file.write('{"step": 3}\n{"st')
    check_record(tmp_path, path, notes.append)
    path.write_text("".join(json.dumps(row | {"time/step": 9.0}) + "\n" for row in rows))
    check_record(tmp_path, path, notes.append)
    for changed in (rows[:1], [rows[0], rows[1] | {"reward": 0.7}], [rows[0], rows[1] | {"uime/step": 1}]):
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(
            RunError, match=f"{path} is damaged: its first 2 rows are not those of {tmp_path.name}"
        ):
            check_record(tmp_path, path, notes.append)
    assert not notes
    path.unlink()
    check_record(tmp_path, path, notes.append)
    assert "is gone: it begins anew" in notes[0]


def test_a_checkpoint_knows_its_rows_whatever_they_took_and_whatever_evaluation_was_made_up(
    tmp_path: Path,
) -> None:
    metrics, notes = tmp_path / "metrics.jsonl", []
    row = {"step": 1, "reward": 0.5, "time/step": 1.0}
    metrics.write_text(json.dumps(row) + "\n")
    write_record(tmp_path, metrics)
    metrics.write_text(json.dumps(row | {"time/step": 2.0, "eval_reward": 0.25}) + "\n")
    check_record(tmp_path, metrics, notes.append)
    metrics.write_text(json.dumps(row | {"reward": 0.75}) + "\n")
    with pytest.raises(RunError, match="is damaged"):
        check_record(tmp_path, metrics, notes.append)
    assert notes == []
