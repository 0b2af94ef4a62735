"""Numbers that are not finite never reach the weights, and a run that has nothing else ends with a diagnosis."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import grpo_cli
from grpo_cli.algorithm.losses import LossOutput
from grpo_cli.data.prompts import Prompt
from grpo_cli.errors import RunError
from grpo_cli.rollout.engine import Completion
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.callbacks import TrainState
from grpo_cli.train.not_finite import BackwardPass, NotFinite
from tests.conftest import byte_tokenizer, tiny_llama
from tests.processes import run_ranks
from tests.train.test_engine_objects import Parrot
from tests.train.test_loop import StopAfter, numbers, run, weights_of

LOSS = "tests.train.test_not_finite:spoilt_loss"

Spoil = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Makes another loss of (B, T) log-probabilities and a loss."""


class Spoiled:
    """Which calls of `spoilt_loss` are spoilt, counted from 0, and how."""

    calls = 0
    which: frozenset[int] = frozenset()
    how: Spoil


def spoilt_loss(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, config: Any, **_: Any
) -> LossOutput:
    loss = -((logprobs - old).exp() * advantages[:, None] * mask).sum() / 20
    if Spoiled.calls in Spoiled.which:
        loss = Spoiled.how(logprobs, loss)
    metrics = {"own/mean": float(loss.detach()), "own/max": float(loss.detach())}
    Spoiled.calls += 1
    return LossOutput(loss, metrics, {"own/mean": 1.0})


def times_nan(logprobs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    return loss * math.nan


def only_the_loss(logprobs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Infinite, with a gradient of 0."""
    return torch.where(torch.zeros_like(logprobs, dtype=torch.bool), logprobs, math.inf).sum()


def only_the_gradient(logprobs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    return loss + (logprobs * 0).sqrt().sum()


def too_large_in_bfloat16(logprobs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    return ((loss + 1).bfloat16() * 1e38 * 1e38).float()


class Weights(grpo_cli.Callback):
    """The weights before the first step and after each."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, state: TrainState) -> None:
        self.after.append({name: value.clone() for name, value in state.model.state_dict().items()})

    on_step_end = on_train_start

    def moved(self, step: int) -> bool:
        """Whether step `step`, counted from 1, changed a weight."""
        before, after = self.after[step - 1], self.after[step]
        return any(not torch.equal(value, after[name]) for name, value in before.items())


def spoilt_run(recipe: dict[str, Any], which: set[int], how: Spoil = times_nan, **changes: Any) -> Any:
    Spoiled.calls, Spoiled.which, Spoiled.how = 0, frozenset(which), staticmethod(how)
    settings = {"loss__type": LOSS, "train__max_tokens_per_microbatch": 10_000, "train__max_steps": 5}
    return run(recipe, **settings | changes)


# What is skipped


@pytest.mark.parametrize("how", [times_nan, only_the_loss, only_the_gradient, too_large_in_bfloat16])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_recipe: dict[str, Any], how: Spoil) -> None:
    weights = Weights()
    rows = spoilt_run(tiny_recipe, {0, 2}, how, callbacks=[weights]).metrics
    assert [row["train/skipped_steps"] for row in rows] == [1, 0, 1, 0, 0]
    assert [weights.moved(step) for step in range(1, 6)] == [False, True, False, True, True]
    for name in ("loss", "grad_norm"):
        assert [row[name] is None for row in rows] == [True, False, True, False, False]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])


def test_moments_and_counts_of_the_optimizer_stay_as_they_were(tiny_recipe: dict[str, Any]) -> None:
    states: list[str] = []

    def at_end_of_step(optimizer: Any) -> Any:
        class Keep(grpo_cli.Callback):
            def on_step_end(self, state: TrainState) -> None:
                torch.set_printoptions(profile="full")
                states.append(str(optimizer.state_dict()["state"]))
                torch.set_printoptions(profile="default")

        return Keep()

    model = tiny_llama(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    spoilt_run(
        tiny_recipe, {1, 2}, train__max_steps=4, model=model, tokenizer=byte_tokenizer(), optimizer=optimizer,
        callbacks=[at_end_of_step(optimizer)],
    )  # fmt: skip
    assert states[0] == states[1] == states[2] != states[3]


def test_a_skipped_step_has_no_part_in_the_means_of_the_others(tiny_recipe: dict[str, Any]) -> None:
    row = spoilt_run(tiny_recipe, {0}, train__optimizer_steps_per_rollout=3, train__max_steps=1).metrics[0]
    assert row["train/skipped_steps"] == 1
    assert math.isfinite(row["loss"] + row["grad_norm"] + row["own/mean"] + row["own/max"])


def test_torch_is_not_told_to_warn_of_a_schedule_that_goes_on(tiny_recipe: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Detected call of")
        spoilt_run(tiny_recipe, {0})


def test_the_same_bytes_with_and_without_a_resume_between_skipped_steps(tiny_recipe: dict[str, Any]) -> None:
    def explodes(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
        factor = 1e300 if "question 3:" in prompts else 1.0
        return [factor * (sum(ids) % 7 + index) for index, ids in enumerate(completion_ids)]

    changes = {"rewards": explodes, "loss__scale_rewards": "none", "train__max_steps": 8, "train__save_every": 1}
    whole = run(tiny_recipe, **changes)
    assert {row["train/skipped_steps"] for row in whole.metrics} == {0, 1}
    changes["train__output_dir"] = tiny_recipe["train"]["output_dir"] + "-resumed"
    for step in range(1, 8):
        parts = run(tiny_recipe, **changes, resume=step > 1, callbacks=[StopAfter(step)])
    parts = run(tiny_recipe, **changes, resume=True)
    assert numbers(parts.output_dir / "metrics.jsonl") == numbers(whole.output_dir / "metrics.jsonl")
    for name, value in weights_of(parts).items():
        assert torch.equal(whole.model.state_dict()[name], value), name


# When the run ends


@pytest.mark.parametrize(("most", "survived"), [(0, 0), (1, 1), (None, 3)])
def test_one_skipped_step_more_than_allowed_in_a_row_ends_the_run(
    tiny_recipe: dict[str, Any], most: int | None, survived: int
) -> None:
    changes = {} if most is None else {"train__max_skipped_steps": most}
    spoilt_run(tiny_recipe, set(range(survived)), **changes)
    changes["train__output_dir"] = tiny_recipe["train"]["output_dir"] + "-2"
    with pytest.raises(
        RunError, match=rf"^step {survived + 1}: numbers are not finite in {survived + 1} opt"
    ) as caught:
        spoilt_run(tiny_recipe, set(range(survived + 1)), **changes)
    assert f", one more than train.max_skipped_steps ({survived}) allows;" in str(caught.value)


def test_a_step_that_is_made_begins_the_count_anew(tiny_recipe: dict[str, Any]) -> None:
    rows = spoilt_run(tiny_recipe, {0, 1, 3, 4}, train__max_skipped_steps=2).metrics
    assert sum(row["train/skipped_steps"] for row in rows) == 4


def test_the_count_goes_on_from_one_step_to_the_next_within_iterations(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"^step 2: numbers are not finite in 3 optimizer steps in a row,"):
        spoilt_run(tiny_recipe, {1, 2, 3}, train__num_iterations=2, train__max_skipped_steps=2)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (times_nan, r"the loss of prompt 1 \(completions 1, 2, 3, 4\), prompt 2 .*Lower optim.learning_rate"),
        (only_the_gradient, r"the gradient \(norm nan\), of a finite loss\. Lower optim.learning_rate"),
    ],
)
def test_the_diagnosis_says_what_came_first(tiny_recipe: dict[str, Any], how: Spoil, told: str) -> None:
    with pytest.raises(RunError, match=told):
        spoilt_run(tiny_recipe, {0}, how, train__max_skipped_steps=0)


def test_rewards_that_are_too_large_are_told_with_their_completions(tiny_recipe: dict[str, Any]) -> None:
    def explodes(completions: list[str]) -> list[float]:
        return [1e300 if index == 5 else 0.0 for index in range(len(completions))]

    changes = {"loss__scale_rewards": "none", "train__max_skipped_steps": 0, "rewards": explodes}
    with pytest.raises(
        RunError, match=r"the advantages of prompt 2 \(completions 1, 2, 3, 4\) of this step;"
    ) as told:
        run(tiny_recipe, **changes)
    assert "the first of these prompts ends in 'question " in str(told.value)
    assert "bound what the reward functions return, or lower rewards[].weight" in str(told.value)


def test_the_message_names_few_prompts_of_many() -> None:
    prompts = [Prompt(index, f"question {index}", [1], {}) for index in range(9)]
    passes = [BackwardPass(torch.arange(18), torch.tensor(1.0), torch.arange(18) % 2 == 0)]
    found = NotFinite.joined([NotFinite.of(passes, torch.zeros(18)), NotFinite([], [], [])])
    text = found.described(Rollout(prompts, [Completion([5], [-1.0], "stop", "&")] * 18, 2), "norm nan")
    places = "prompt 1 (completion 2), prompt 2 (completion 2), prompt 3 (completion 2) and 6 more prompts"
    assert text.startswith(
        f"the log-probabilities of {places} of this step; the first of these prompts ends in 'que"
    )


@pytest.mark.slow
def test_two_processes_end_with_the_diagnosis_of_one(tiny_recipe: dict[str, Any]) -> None:
    from grpo_cli.recipe.load import dump_recipe, load_recipe

    tiny_recipe["rewards"] = ["tests.train.test_not_finite:large_for_the_last"]
    tiny_recipe["loss"] = {"scale_rewards": "none"}
    tiny_recipe["train"]["max_skipped_steps"] = 1
    path = tiny_recipe["train"]["output_dir"] + ".yaml"
    with open(path, "w") as file:
        file.write(dump_recipe(load_recipe(tiny_recipe)))
    codes, output = run_ranks(2, "train", path)
    assert codes == [1, 1], output
    assert "step 2: numbers are not finite in 2 optimizer steps in a row" in " ".join(output.split())
    assert "the advantages of prompt 3 (completions 1, 2, 3, 4)" in " ".join(output.split())


def large_for_the_last(completions: list[str]) -> list[float]:
    return [0.0] * (len(completions) - 1) + [1e300]


# What is survived


def broken_head(value: float = math.nan) -> Any:
    model = tiny_llama()
    model.lm_head.weight.data[7] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_no_probabilities_ends_generation_with_a_message(
    tiny_recipe: dict[str, Any], value: float
) -> None:
    model = broken_head(value)
    with pytest.raises(
        RunError, match=r"^generation: for token 1 of a completion the model's output is NaN or inf"
    ):
        run(tiny_recipe, model=model, tokenizer=byte_tokenizer())


@pytest.mark.parametrize(
    "sampling", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}], ids=str
)
def test_with_every_filter_too(tiny_recipe: dict[str, Any], sampling: dict[str, Any]) -> None:
    changes = {f"generation__{key}": value for key, value in sampling.items()}
    with pytest.raises(RunError, match=r"^generation: for token 1 of a completion"):
        run(tiny_recipe, model=broken_head(), tokenizer=byte_tokenizer(), **changes)


def test_a_model_that_overflows_ends_generation_with_a_message(tiny_recipe: dict[str, Any]) -> None:
    model = tiny_llama()
    model.lm_head.weight.data *= 1e38
    with pytest.raises(RunError, match="overflow in the precision that they are computed in"):
        run(tiny_recipe, model=model, tokenizer=byte_tokenizer(), model__compute_dtype="bfloat16")


def test_the_policy_s_own_broken_numbers_are_told_where_another_engine_samples(
    tiny_recipe: dict[str, Any],
) -> None:
    told = (
        r"step 2: numbers .* in 2 optimizer steps .* the log-probabilities of prompt 1 \(completions 1, 2, 3, 4\),"
    )
    with pytest.raises(RunError, match=told):
        run(
            tiny_recipe, model=broken_head(), tokenizer=byte_tokenizer(), engine=Parrot(),
            train__max_skipped_steps=1,
        )  # fmt: skip


def test_a_reward_that_explodes_trains_as_a_smaller_one(tiny_recipe: dict[str, Any]) -> None:
    def exploding(completion_ids: list[list[int]]) -> list[float]:
        return [1e300 * (sum(ids) % 7) for ids in completion_ids]

    def large(completion_ids: list[list[int]]) -> list[float]:
        return [1e10 * (sum(ids) % 7) for ids in completion_ids]

    first = run(tiny_recipe, rewards=exploding)
    second = run(tiny_recipe, rewards=large, train__output_dir=tiny_recipe["train"]["output_dir"] + "-2")
    assert all(row["train/skipped_steps"] == 0 for row in first.metrics)
    assert all(row["reward_std"] > 1e299 for row in first.metrics)
    for name, value in weights_of(first).items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("drop", [False, True, "resample"])
def test_steps_that_nothing_scores_change_no_weight(tiny_recipe: dict[str, Any], beta: float, drop: Any) -> None:
    def none(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    result = run(tiny_recipe, rewards=none, loss__beta=beta, loss__drop_zero_variance_groups=drop)
    assert [row["train/skipped_steps"] for row in result.metrics] == [0, 0, 0]
    assert [row["reward"] for row in result.metrics] == [None, None, None]
    for name, value in tiny_llama().state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], value, rtol=0, atol=1e-6)


def test_two_completions_with_equal_rewards_change_no_weight(tiny_recipe: dict[str, Any]) -> None:
    def equal(completions: list[str]) -> list[float]:
        return [0.1] * len(completions)

    result = run(tiny_recipe, rewards=equal, generation__num_generations=2)
    for row in result.metrics:
        assert (row["train/skipped_steps"], row["grad_norm"], row["loss"]) == (0, 0, 0)
    for name, value in tiny_llama().state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value), name


class Odd(Parrot):
    """Completions of the lengths and with the log-probability that it is told."""

    def __init__(self, lengths: list[int], logprob: float = -1.0) -> None:
        super().__init__()
        self.group = [Completion([5] * n, [logprob] * n, "stop", "&" * n) for n in lengths]

    def generate(self, prompts: Any, *_: Any, **__: Any) -> list[list[Completion]]:
        return [self.group for _ in prompts]


@pytest.mark.parametrize("lengths", [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize(
    "loss",
    [{}, {"type": "grpo", "beta": 0.1}, {"importance_level": "sequence"}, {"top_entropy_quantile": 0.5}],
    ids=str,
)
def test_completions_without_a_token_are_trained_with(
    tiny_recipe: dict[str, Any], lengths: list[int], loss: dict[str, Any]
) -> None:
    changes = {f"loss__{key}": value for key, value in loss.items()}

    def by_place(completions: list[str]) -> list[float]:
        return [float(index % 4) for index in range(len(completions))]

    result = run(tiny_recipe, engine=Odd(lengths), rewards=by_place, **changes)
    for row in result.metrics:
        assert row["train/skipped_steps"] == 0
        assert math.isfinite(row["loss"] + row["grad_norm"])


@pytest.mark.parametrize("logprob", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("mode", [None, "token_truncate", "sequence_mask"])
def test_what_an_engine_says_never_spoils_a_step(tiny_recipe: dict[str, Any], logprob: float, mode: Any) -> None:
    changes = {} if mode is None else {"loss__sampler_correction": {"mode": mode}}
    result = run(tiny_recipe, engine=Odd([1, 2, 3, 4], logprob), loss__off_policy_threshold=0.5, **changes)
    assert [row["train/skipped_steps"] for row in result.metrics] == [0, 0, 0]
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
