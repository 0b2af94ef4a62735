"""What is not computed changes nothing: skipped groups, dropped groups, old log-probabilities, overlap."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import grpo_cli
from grpo_cli.data.sampler import PromptSampler
from grpo_cli.episode.driver import Driver
from grpo_cli.errors import RunError
from grpo_cli.recipe.loss_types import LOSS_TYPES
from grpo_cli.train import learner, rollouts
from grpo_cli.train.learner import Learner
from grpo_cli.train.rollouts import MAX_RESAMPLE_ROUNDS
from tests.conftest import byte_tokenizer, tiny_llama
from tests.train.test_loop import numbers, ragged_llama, run, weights_of

SAMPLER = PromptSampler(10, 3, seed=42, shuffle=True)
"""That of `tiny_recipe`."""

FLAT = {7, 6, 4, 0}
"""Prompts whose groups have no spread: one in each of the first four steps."""


def number_of(prompt: str) -> int:
    """The i of `question i:`."""
    return int(prompt.removeprefix("question ").removesuffix(":"))


def flat_for_some(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
    return [
        0.0 if number_of(prompt) in FLAT else 1.0 + sum(ids) % 7
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def all_flat(completions: list[str]) -> list[float]:
    return [3.0] * len(completions)


class Forwards(grpo_cli.Callback):
    """Counts the forward passes of a model, by whether they train; those that generate are left out."""

    is_generating = False

    def __init__(self, model: Any) -> None:
        self.training = self.scoring = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.training += 1
        elif not self.is_generating:
            self.scoring += 1

    def on_train_start(self, state: Any) -> None:
        self.training = self.scoring = 0  # those of the self-check


@pytest.fixture(autouse=True)
def generation_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Driver.generate

    def generating(*arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Forwards, "is_generating", True)
            return generate(*arguments, **options)

    monkeypatch.setattr(Driver, "generate", generating)


def trained(recipe: dict[str, Any], name: str, **changes: Any) -> tuple[Any, Forwards]:
    """Train a ragged Llama in a folder `name`; every group has a pack of its own."""
    model = changes.pop("model", None) or ragged_llama()
    forwards = Forwards(model)
    changes = {"rewards": flat_for_some, "train__max_tokens_per_microbatch": 50} | changes
    folder = f"{recipe['train']['output_dir']}-{name}"
    result = run(
        recipe, model=model, tokenizer=byte_tokenizer(), callbacks=[forwards], train__output_dir=folder, **changes
    )
    return result, forwards


def assert_same_weights(first: Any, second: Any, tolerance: float = 1e-6) -> None:
    for name, value in weights_of(first).items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=0, atol=tolerance)


def forward_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def every_group(advantages: torch.Tensor, trained: Any, num_generations: int, config: Any) -> torch.Tensor:
        return torch.ones(len(advantages) // num_generations, dtype=torch.bool)

    monkeypatch.setattr(rollouts, "groups_to_forward", every_group)


# Groups without a gradient


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_skipping_flat_groups_changes_nothing_but_time(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, loss_type: str, mask_truncated: bool
) -> None:
    # Weights move as the gradient does, whose momentum shows whether a step was left out.
    tiny_recipe["optim"] = {"name": "torch.optim:SGD", "learning_rate": 0.1, "params": {"momentum": 0.9}}
    changes: dict[str, Any] = {
        "loss__type": loss_type, "loss__mask_truncated": mask_truncated, "train__optimizer_steps_per_rollout": 2,
    }  # fmt: skip
    skipping, fewer = trained(tiny_recipe, "skip", **changes)
    forward_everything(monkeypatch)
    forwarding, all_of_them = trained(tiny_recipe, "forward", **changes)
    assert_same_weights(skipping, forwarding)
    assert fewer.training < all_of_them.training
    assert fewer.scoring < all_of_them.scoring
    for ours, theirs in zip(skipping.metrics, forwarding.metrics, strict=True):
        assert 0 < ours["frac_groups_skipped"] < 1
        assert theirs["frac_groups_skipped"] == 0
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "loss",
    [{"beta": 0.1}, {"entropy_coef": 0.01}, {"top_entropy_quantile": 0.5}],
    ids=lambda loss: next(iter(loss)),
)
def test_a_term_that_needs_every_token_gets_every_group(tiny_recipe: dict[str, Any], loss: dict[str, Any]) -> None:
    tiny_recipe["loss"] = loss
    result, _ = trained(tiny_recipe, "all", rewards=all_flat)
    assert [row["frac_groups_skipped"] for row in result.metrics] == [0, 0, 0]
    assert all(row["entropy"] > 0 for row in result.metrics)


def flat_in_the_second_step(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
    return [
        0.0 if number_of(prompt) in SAMPLER.at(1) else float(sum(ids) % 7)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def test_a_step_of_flat_groups_forwards_nothing_and_still_counts(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_recipe["optim"] = {"learning_rate": 1e-4, "weight_decay": 0.1}
    snapshots: list[torch.Tensor] = []

    class Snapshot(grpo_cli.Callback):
        def on_step_end(self, state: Any) -> None:
            snapshots.append(state.model.lm_head.weight.detach().clone())

    result = run(
        tiny_recipe, model=ragged_llama(), tokenizer=byte_tokenizer(), rewards=flat_in_the_second_step,
        callbacks=[Snapshot()], train__output_dir=tiny_recipe["train"]["output_dir"] + "-skip",
    )  # fmt: skip
    row = result.metrics[1]
    assert (row["loss"], row["grad_norm"], row["frac_groups_skipped"]) == (0, 0, 1)
    assert row["frac_reward_zero_std"] == 1
    assert "entropy" not in row
    assert "clip_ratio/region_mean" not in row
    assert [r["learning_rate"] for r in result.metrics] == pytest.approx([1e-4, 2e-4 / 3, 1e-4 / 3])
    assert not torch.equal(snapshots[0], snapshots[1]), "momentum and weight decay go on"
    forward_everything(monkeypatch)
    forwarded = run(
        tiny_recipe, model=ragged_llama(), tokenizer=byte_tokenizer(), rewards=flat_in_the_second_step,
        train__output_dir=tiny_recipe["train"]["output_dir"] + "-forward",
    )  # fmt: skip
    for name, value in weights_of(result).items():
        assert torch.equal(forwarded.model.state_dict()[name], value), name


def test_a_run_of_flat_groups_leaves_the_weights_alone(tiny_recipe: dict[str, Any]) -> None:
    result, forwards = trained(tiny_recipe, "flat", rewards=all_flat)
    assert forwards.training == forwards.scoring == 0
    assert_same_weights(result, type("Start", (), {"model": ragged_llama()}), tolerance=0)


# Dropped groups


def test_dropped_groups_are_not_in_the_normaliser(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["optim"] = {"name": "torch.optim:SGD", "learning_rate": 0.1, "max_grad_norm": 1e6}
    tiny_recipe["loss"] = {"type": "dr_grpo"}  # divides by the number of completions
    tiny_recipe["train"] |= {"max_steps": 1, "prompts_per_step": 4}
    whole, _ = trained(tiny_recipe, "whole")
    dropped, _ = trained(tiny_recipe, "dropped", loss__drop_zero_variance_groups=True)
    flat = whole.metrics[0]["frac_reward_zero_std"]
    assert 0 < flat < 1
    start = ragged_llama().state_dict()
    for name, value in weights_of(whole).items():
        expected = (value - start[name]) / (1 - flat)
        torch.testing.assert_close(dropped.model.state_dict()[name] - start[name], expected, rtol=1e-4, atol=1e-6)
    for name in ("reward", "reward_std", "frac_reward_zero_std", "num_tokens", "frac_groups_skipped"):
        assert dropped.metrics[0][name] == whole.metrics[0][name], name
    assert not any(name.startswith("resample/") for name in dropped.metrics[0])


def test_batch_scaled_advantages_are_those_of_the_kept_groups(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["loss"] = {"scale_rewards": "batch", "drop_zero_variance_groups": True}
    result, _ = trained(tiny_recipe, "batch", train__max_steps=1, train__prompts_per_step=4)
    table = pq.read_table(result.output_dir / "completions" / "step-000001.parquet").to_pydict()
    kept = [row for row, prompt in enumerate(table["prompt"]) if number_of(prompt) not in FLAT]
    rewards = torch.tensor(table["reward/flat_for_some"], dtype=torch.float64)[kept]
    centred = (rewards.view(-1, 4) - rewards.view(-1, 4).mean(1, keepdim=True)).flatten()
    expected = torch.zeros(len(table["prompt"]))
    expected[kept] = (centred / (rewards.std() + 1e-4)).float()
    assert 0 < len(kept) < len(expected)
    torch.testing.assert_close(torch.tensor(table["advantage"]), expected)


def prompts_of(result: Any, step: int) -> list[int]:
    """The prompt of each group that a step generated."""
    path = Path(result.output_dir) / "completions" / f"step-{step:06d}.parquet"
    return [number_of(prompt) for prompt in pq.read_table(path)["prompt"].to_pylist()[::4]]


def test_resampling_fills_the_step_with_groups_that_have_spread(tiny_recipe: dict[str, Any]) -> None:
    normalised: list[int] = []
    original = learner.loss_normalizer

    def spy(mask: torch.Tensor, *rest: Any) -> float:
        normalised.append(len(mask) // 4)
        return original(mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "loss_normalizer", spy)
        result, _ = trained(tiny_recipe, "resample", loss__drop_zero_variance_groups="resample")
    assert normalised == [3, 3, 3]
    tokens = 0
    for row in result.metrics:
        prompts = prompts_of(result, row["step"])
        assert len(set(prompts)) == len(prompts), "no prompt comes twice while there are others"
        assert len(prompts) == row["resample/generated_groups"] > 3
        assert 1 <= row["resample/rounds"] <= MAX_RESAMPLE_ROUNDS
        assert row["frac_reward_zero_std"] == pytest.approx(sum(p in FLAT for p in prompts) / len(prompts))
        assert row["frac_groups_skipped"] == pytest.approx(1 - 3 / len(prompts))
        tokens += len(prompts) * 4 * (len("question 0:") + row["completions/mean_length"])
        assert row["num_tokens"] == pytest.approx(tokens)


def test_resampling_gives_up_after_its_rounds_and_the_schedule_goes_on(tiny_recipe: dict[str, Any]) -> None:
    result, forwards = trained(
        tiny_recipe, "hopeless", rewards=all_flat, loss__drop_zero_variance_groups="resample"
    )
    assert forwards.training == 0
    for row in result.metrics:
        assert row["resample/rounds"] == MAX_RESAMPLE_ROUNDS
        assert row["resample/generated_groups"] == 3 + 3 * MAX_RESAMPLE_ROUNDS
        assert (row["loss"], row["grad_norm"], row["frac_groups_skipped"]) == (0, 0, 1)
        assert row["reward"] == 3
    assert [row["learning_rate"] for row in result.metrics] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


def test_a_group_that_nothing_scored_is_dropped(tiny_recipe: dict[str, Any]) -> None:
    def none_for_some(prompts: list[str], completion_ids: list[list[int]]) -> list[float | None]:
        scores = flat_for_some(prompts, completion_ids)
        return [
            None if number_of(prompt) in FLAT else score for prompt, score in zip(prompts, scores, strict=True)
        ]

    result, _ = trained(tiny_recipe, "none", rewards=none_for_some, loss__drop_zero_variance_groups="resample")
    assert all(row["resample/generated_groups"] > 3 for row in result.metrics)
    assert all(math.isfinite(row["loss"]) for row in result.metrics)


def test_a_resumed_run_resamples_what_the_uninterrupted_one_does(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["optim"]["scheduler"] = "constant"
    tiny_recipe["loss"] = {"drop_zero_variance_groups": "resample"}
    options: dict[str, Any] = {"rewards": flat_for_some}
    trained(tiny_recipe, "cut", **options, train__max_steps=2)
    resumed, _ = trained(tiny_recipe, "cut", **options, train__max_steps=4, resume=True)
    straight, _ = trained(tiny_recipe, "straight", **options, train__max_steps=4)
    assert numbers(resumed.output_dir / "metrics.jsonl") == numbers(straight.output_dir / "metrics.jsonl")
    assert [prompts_of(resumed, step) for step in (3, 4)] == [prompts_of(straight, step) for step in (3, 4)]
    assert_same_weights(resumed, straight, tolerance=0)


# Old log-probabilities


@pytest.mark.parametrize(
    ("optimizer_steps", "iterations", "dropout", "scored"),
    [
        (1, 1, 0.0, 0),
        (1, 2, 0.0, 0),
        (3, 1, 0.0, 2),
        (3, 2, 0.0, 2),
        (1, 1, 0.5, 0),
        (3, 1, 0.5, 2),
        (3, 2, 0.5, 3),
    ],
)
def test_old_logprobs_cost_a_pass_only_where_the_policy_has_moved(
    tiny_recipe: dict[str, Any], optimizer_steps: int, iterations: int, dropout: float, scored: int
) -> None:
    def never_flat(completion_ids: list[list[int]]) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    if dropout:
        tiny_recipe["model"]["lora"] = {"r": 4, "dropout": dropout}
    _, forwards = trained(
        tiny_recipe, "count", rewards=never_flat, train__optimizer_steps_per_rollout=optimizer_steps,
        train__num_iterations=iterations, train__max_steps=1, train__max_tokens_per_microbatch=50,
    )  # fmt: skip
    assert forwards.training == 3 * iterations
    assert forwards.scoring == scored


def test_weights_are_those_of_scoring_every_pack_beforehand(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_recipe["optim"] = {"name": "torch.optim:SGD", "learning_rate": 0.3}
    changes = {"train__optimizer_steps_per_rollout": 2, "train__num_iterations": 3}
    fewer, _ = trained(tiny_recipe, "fewer", **changes)
    original = Learner.score

    def score_all(self: Learner, data: Any, parts: Any) -> Any:
        return original(self, data, [replace(parts[0], packs=[]), *parts])

    monkeypatch.setattr(Learner, "score", score_all)
    everything, forwards = trained(tiny_recipe, "everything", **changes)
    assert forwards.scoring > 0
    assert_same_weights(fewer, everything)
    assert any(row["clip_ratio/region_mean"] > 0 for row in fewer.metrics), (
        "or old log-probabilities matter little"
    )


# Overlap


def test_the_reference_is_computed_while_rewards_are_waited_for(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()
    original = Learner.reference_logprobs

    def score(*arguments: Any) -> Any:
        logprobs = original(*arguments)
        reached.set()
        return logprobs

    def patient(completion_ids: list[list[int]]) -> list[float]:
        assert reached.wait(20), "the reference waits for the rewards"
        return [float(sum(ids) % 7) for ids in completion_ids]

    monkeypatch.setattr(Learner, "reference_logprobs", score)
    tiny_recipe["rewards"] = [{"path": "my:patient", "workers": 1}]
    result, _ = trained(tiny_recipe, "overlap", rewards=patient, loss__beta=0.1, train__max_steps=1)
    assert result.metrics[0]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("drop", [False, "resample"])
def test_workers_change_no_byte_of_the_weights(tiny_recipe: dict[str, Any], drop: Any) -> None:
    tiny_recipe["loss"] = {"drop_zero_variance_groups": drop}
    at_once, _ = trained(tiny_recipe, "at-once")
    tiny_recipe["rewards"] = [{"path": "my:flat_for_some", "workers": 3}]
    beside, _ = trained(tiny_recipe, "beside")
    assert_same_weights(at_once, beside, tolerance=0)


def test_a_failing_reward_ends_the_run_and_a_slow_one_is_waited_for_in_time_reward(
    tiny_recipe: dict[str, Any],
) -> None:
    def slow(completions: list[str]) -> list[float]:
        threading.Event().wait(0.3)
        return [float(len(text)) for text in completions]

    result, _ = trained(tiny_recipe, "slow", rewards=slow, train__max_steps=1)
    assert result.metrics[0]["time/reward"] > 0.1

    def broken(completions: list[str]) -> list[float]:
        raise OSError("the judge is away")

    with pytest.raises(RunError, match=r"broken, step 1: raised OSError: the judge is away"):
        run(
            tiny_recipe, model=tiny_llama(), tokenizer=byte_tokenizer(), rewards=broken,
            train__output_dir=tiny_recipe["train"]["output_dir"] + "-broken",
        )  # fmt: skip
