"""A run whose engine reports other log-probabilities than the policy's: the loop weighs its gradient by them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo_cli
from grpo_cli.episode.driver import Driver
from grpo_cli.record.metrics import read_metrics
from tests.conftest import byte_tokenizer, tiny_llama

SHIFT = 0.5
"""Nats by which the sampler claims each token to be less likely than it is: weights of exp(0.5) = 1.65."""
DIFFERENCE = "sampling/sampling_logp_difference"
RATIO = "sampling/importance_sampling_ratio"

Report = Callable[[list[float]], list[float]]


def shifted(logprobs: list[float]) -> list[float]:
    return [value - SHIFT for value in logprobs]


def partly_unknown(logprobs: list[float]) -> list[float]:
    return [value - SHIFT if index % 2 else math.nan for index, value in enumerate(logprobs)]


def unknown(logprobs: list[float]) -> list[float]:
    return [math.nan] * len(logprobs)


@pytest.fixture
def train(tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Train one step by gradient descent; the engine reports what `report` makes of its log-probabilities."""
    generate = Driver.generate
    runs: list[Path] = []

    def run(report: Report | None, loss: dict[str, Any], **train_settings: Any) -> Any:
        def reporting(self: Driver, *args: Any, **kwargs: Any) -> Any:
            groups = generate(self, *args, **kwargs)
            if report is None:
                return groups
            return [[replace(one, logprobs=report(one.logprobs)) for one in group] for group in groups]

        monkeypatch.setattr(Driver, "generate", reporting)
        values = json.loads(json.dumps(tiny_recipe))
        runs.append(tmp_path / f"run{len(runs)}")
        values["loss"] = loss
        values["optim"] = {"name": "torch.optim:SGD", "learning_rate": 0.1, "max_grad_norm": 1e9}
        values["train"] |= {"output_dir": str(runs[-1]), "max_steps": 1} | train_settings
        eos = [256, *range(0, 256, 8)]  # so many that completions differ in length
        return grpo_cli.train(values, model=tiny_llama(eos_token_id=eos), tokenizer=byte_tokenizer())

    return run


def updates(result: Any) -> dict[str, torch.Tensor]:
    """How far each weight moved, which is the gradient times the learning rate."""
    start = tiny_llama().state_dict()
    return {name: value.detach() - start[name] for name, value in result.model.state_dict().items()}


@pytest.mark.parametrize(
    ("correction", "scale"),
    [
        ({"clip_max": 3.0}, math.exp(SHIFT)),
        ({"clip_max": 1.25}, 1.25),
        ({"mode": "token_mask", "clip_max": 3.0}, math.exp(SHIFT)),
        ({"mode": "token_mask", "clip_max": 1.25}, 0.0),
        ({"mode": "sequence_truncate", "clip_max": 1.25}, 1.25),
        ({"mode": "sequence_mask", "clip_max": 1.25}, 0.0),
    ],
    ids=str,
)
def test_a_sampler_off_by_a_constant_scales_the_gradient_by_its_weight(
    train: Callable[..., Any], correction: dict[str, Any], scale: float
) -> None:
    plain = train(None, {})
    corrected = train(shifted, {"sampler_correction": correction})
    moved = updates(plain)
    assert max(value.abs().max() for value in moved.values()) > 1e-3
    for name, value in updates(corrected).items():
        torch.testing.assert_close(value, scale * moved[name], rtol=1e-4, atol=2e-7)
    assert corrected.metrics[0]["grad_norm"] == pytest.approx(scale * plain.metrics[0]["grad_norm"], rel=1e-4)


def test_metrics_are_in_the_file_with_and_without_a_correction(train: Callable[..., Any], tmp_path: Path) -> None:
    train(shifted, {"sampler_correction": {"clip_max": 1.25}})
    train(shifted, {})
    (with_correction,), (without,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run0", "run1"))
    for row in (with_correction, without):
        assert row[f"{DIFFERENCE}/mean"] == pytest.approx(SHIFT, abs=1e-4)
        assert row[f"{DIFFERENCE}/max"] == pytest.approx(SHIFT, abs=1e-4)
    assert [with_correction[f"{RATIO}/{kind}"] for kind in ("min", "mean", "max")] == pytest.approx([1.25] * 3)
    assert not [name for name in without if name.startswith(RATIO)]


def test_the_engine_on_the_policy_itself_differs_by_rounding_alone(train: Callable[..., Any]) -> None:
    assert train(None, {}).metrics[0][f"{DIFFERENCE}/max"] < 1e-4


@pytest.mark.parametrize("budget", [1, 4096])
def test_the_sampler_is_compared_with_the_policy_that_was_not_updated_yet(
    train: Callable[..., Any], budget: int
) -> None:
    """Later iterations and minibatches have moved on; the ratio of the loss accounts for that."""
    result = train(
        shifted, {"sampler_correction": {}}, num_iterations=3, optimizer_steps_per_rollout=3,
        max_tokens_per_microbatch=budget,
    )  # fmt: skip
    assert result.metrics[0]["clip_ratio/region_mean"] > 0, "the policy moved, or the test says nothing"
    assert result.metrics[0][f"{DIFFERENCE}/max"] == pytest.approx(SHIFT, abs=1e-3)
    for kind in ("min", "max"):
        assert result.metrics[0][f"{RATIO}/{kind}"] == pytest.approx(math.exp(SHIFT), abs=1e-3)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_unknown_log_probabilities_are_not_corrected(train: Callable[..., Any], mode: str) -> None:
    plain = train(None, {"off_policy_threshold": 0.1})
    result = train(unknown, {"off_policy_threshold": 0.1, "sampler_correction": {"mode": mode}})
    for name, value in updates(plain).items():
        torch.testing.assert_close(updates(result)[name], value, rtol=0, atol=1e-8)
    assert result.metrics[0][f"{RATIO}/max"] == result.metrics[0][f"{RATIO}/min"] == 1
    assert f"{DIFFERENCE}/mean" not in result.metrics[0]


def test_the_split_into_micro_batches_changes_nothing_with_half_of_the_values_unknown(
    train: Callable[..., Any],
) -> None:
    loss = {"sampler_correction": {"mode": "sequence_truncate", "clip_max": 2.0}, "off_policy_threshold": 0.5}
    small, large = (train(partly_unknown, loss, max_tokens_per_microbatch=budget) for budget in (1, 4096))
    moved = updates(large)
    assert max(value.abs().max() for value in moved.values()) > 1e-3
    for name, value in updates(small).items():
        torch.testing.assert_close(value, moved[name], rtol=1e-4, atol=2e-6)
    for kind in ("min", "mean", "max"):
        ours, theirs = (result.metrics[0][f"{RATIO}/{kind}"] for result in (small, large))
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert small.metrics[0][f"{RATIO}/min"] < small.metrics[0][f"{RATIO}/max"]
