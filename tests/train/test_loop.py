"""The loop computes what the papers say: compared with the equations in plain torch, and with itself split up."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from rich.console import Console

import grpo_cli
from grpo_cli.algorithm.packing import Group, pack_groups
from grpo_cli.errors import UserError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.record.metrics import read_metrics
from grpo_cli.train.guards import deterministic_kernels
from tests.conftest import byte_tokenizer, tiny_llama

TIMES = ("time/", "tokens_per_second")
RAGGED_EOS = [256, *range(0, 256, 8)]
"""So many tokens end a completion that the tiny random model's completions differ in length."""


def run(recipe: dict[str, Any], **changes: Any) -> Any:
    """Train the tiny model; `section__key=value` changes the recipe."""
    values = json.loads(json.dumps(recipe))
    objects = {}
    for name, value in changes.items():
        section, separator, key = name.partition("__")
        if separator:
            values.setdefault(section, {})[key] = value
        else:
            objects[name] = value
    return grpo_cli.train(values, **objects)


def weights_of(result: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in result.model.state_dict().items()}


def numbers(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its times."""
    return [
        {name: value for name, value in row.items() if not name.startswith(TIMES)} for row in read_metrics(path)
    ]


def ragged_llama() -> Any:
    return tiny_llama(eos_token_id=RAGGED_EOS)


class Recorder:
    """A reward that keeps what it was called with."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[list[int]], list[str], list[float]]] = []

    def __call__(self, prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        scores = [float(sum(ids) % 7) for ids in completion_ids]
        self.steps.append((completion_ids, prompts, scores))
        return scores


def train_by_the_book(steps: list[Any], beta: float, group: int, learning_rate: float, total_steps: int) -> Any:
    """GRPO as published (arXiv:2402.03300 with token-level averaging), one completion at a time, plain torch."""
    model, reference, tokenizer = ragged_llama().train(), ragged_llama().eval(), byte_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)

    def logprobs_of(network: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
        logits = network(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)

    for index, (completion_ids, prompts, scores) in enumerate(steps):
        rewards = torch.tensor(scores, dtype=torch.float64).view(-1, group)
        mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
        advantages = ((rewards - mean) / (std + 1e-4)).float().view(-1)
        num_tokens = sum(len(ids) for ids in completion_ids)
        loss = torch.zeros(())
        for prompt, ids, advantage in zip(prompts, completion_ids, advantages, strict=True):
            prompt_ids = tokenizer(prompt)["input_ids"]
            logprobs = logprobs_of(model, prompt_ids, ids)
            ratio = (logprobs - logprobs.detach()).exp()
            token_loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            if beta:
                with torch.no_grad():
                    difference = logprobs_of(reference, prompt_ids, ids)
                difference = difference - logprobs
                token_loss = token_loss + beta * (difference.exp() - difference - 1)
            loss = loss + token_loss.sum() / num_tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate * (1 - index / total_steps)
        optimizer.step()
    return model


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_weights_after_three_steps_are_those_of_the_published_equations(
    tiny_recipe: dict[str, Any], beta: float
) -> None:
    recorder = Recorder()
    # AdamW divides rounding by its own size where a gradient is almost 0; a small rate keeps that below 1e-6.
    result = run(
        tiny_recipe, loss__beta=beta, rewards=recorder, model=ragged_llama(), tokenizer=byte_tokenizer(),
        optim__learning_rate=1e-4,
    )  # fmt: skip
    assert len(recorder.steps) == 3
    assert len({len(ids) for ids in recorder.steps[0][0]}) > 1, "ragged completions, or the test says little"
    expected = train_by_the_book(recorder.steps, beta, group=4, learning_rate=1e-4, total_steps=3)
    start = ragged_llama().state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], value, rtol=0, atol=1e-6)
        assert not torch.equal(value, start[name]), f"{name} was not trained"


def test_the_same_recipe_twice_gives_the_same_bytes(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    first = run(tiny_recipe, train__output_dir=str(tmp_path / "a"), loss__beta=0.1)
    second = run(tiny_recipe, train__output_dir=str(tmp_path / "b"), loss__beta=0.1)
    assert numbers(tmp_path / "a" / "metrics.jsonl") == numbers(tmp_path / "b" / "metrics.jsonl")
    for name, value in weights_of(first).items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_the_gradient_is_the_same_bytes_however_threads_run() -> None:
    model = tiny_llama(hidden_size=512, num_attention_heads=8, num_key_value_heads=8)
    tokens = torch.randint(256, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    group = Group(tokens[:30], [tokens[30 + 20 * i : 50 + 20 * i] for i in range(8)], range(8))
    (pack,) = pack_groups([group], 4096)
    policy = PackedModel.checked(model)

    def gradient() -> list[torch.Tensor]:
        model.zero_grad()
        policy.token_logprobs(pack, 1.0)[0].square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with deterministic_kernels():
            first = gradient()
            for _ in range(10):
                assert all(map(torch.equal, first, gradient()))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "loss",
    [
        {"type": "grpo", "beta": 0.1},
        {"type": "dapo", "top_entropy_quantile": 0.5},
        {"type": "dr_grpo", "entropy_coef": 0.01},
        {"type": "luspo", "importance_level": "sequence"},
    ],
    ids=lambda loss: loss["type"],
)
def test_the_split_into_micro_batches_changes_nothing(tiny_recipe: dict[str, Any], loss: dict[str, Any]) -> None:
    tiny_recipe["loss"] = loss
    tiny_recipe["optim"] = {"name": "torch.optim:SGD", "learning_rate": 0.1}  # weights move as the gradient does
    base = Path(tiny_recipe["train"]["output_dir"])
    results = [
        run(
            tiny_recipe,
            train__output_dir=str(base / str(budget)),
            train__max_tokens_per_microbatch=budget,
            model=ragged_llama(),
            tokenizer=byte_tokenizer(),
        )
        for budget in (1, 40, 4096)
    ]
    for other in results[1:]:
        for name, value in weights_of(results[0]).items():
            torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-4, atol=2e-6)
        for ours, theirs in zip(results[0].metrics, other.metrics, strict=True):
            for name in set(ours) - {n for n in ours if n.startswith(TIMES)}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_several_iterations_and_optimizer_steps_update_and_clip(tiny_recipe: dict[str, Any]) -> None:
    result = run(
        tiny_recipe, train__num_iterations=2, train__optimizer_steps_per_rollout=2, optim__learning_rate=3e-2
    )
    assert any(row["clip_ratio/region_mean"] > 0 for row in result.metrics)


def test_a_prompt_count_that_nothing_divides_is_fine(tiny_recipe: dict[str, Any]) -> None:
    result = run(tiny_recipe, train__prompts_per_step=7, train__optimizer_steps_per_rollout=3, train__max_steps=2)
    assert [row["epoch"] for row in result.metrics] == pytest.approx([0.7, 1.4])


def test_truncated_completions_can_stay_out_of_the_loss(tiny_recipe: dict[str, Any]) -> None:
    recorder = Recorder()
    result = run(
        tiny_recipe, loss__mask_truncated=True, generation__max_completion_tokens=1, rewards=recorder,
        model=tiny_llama(), tokenizer=byte_tokenizer(), train__max_steps=1,
    )  # fmt: skip
    assert result.metrics[0]["completions/clipped_ratio"] == 1
    assert result.metrics[0]["grad_norm"] == 0


def test_lora_trains_the_adapter_alone_and_final_is_a_plain_model(tiny_recipe: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    tiny_recipe["model"]["lora"] = {"r": 4, "alpha": 8}
    result = run(tiny_recipe, loss__beta=0.1)
    start = tiny_llama().state_dict()
    base = {
        name.replace(".base_layer", ""): value
        for name, value in result.model.get_base_model().state_dict().items()
        if "lora_" not in name
    }
    assert all(torch.equal(base[name], value) for name, value in start.items())
    final = AutoModelForCausalLM.from_pretrained(result.output_dir / "final")
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(final(tokens).logits, result.model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
    assert result.metrics[-1]["kl"] > 0


def test_gradient_checkpointing_changes_nothing(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    plain = run(tiny_recipe, train__output_dir=str(tmp_path / "plain"))
    saved = run(tiny_recipe, train__output_dir=str(tmp_path / "saved"), model__gradient_checkpointing=True)
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(saved.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_bfloat16_weights_train(tiny_recipe: dict[str, Any]) -> None:
    result = run(tiny_recipe, model__dtype="bfloat16", optim__learning_rate=1e-2)
    assert next(result.model.parameters()).dtype == torch.bfloat16
    assert all(row["grad_norm"] > 0 for row in result.metrics)


def test_reward_rises_on_a_task_that_a_tiny_model_can_learn(tiny_recipe: dict[str, Any]) -> None:
    def count_token(completion_ids: list[list[int]]) -> list[float]:
        return [ids.count(17) / len(ids) for ids in completion_ids]

    result = run(
        tiny_recipe, rewards=count_token, model=tiny_llama(), tokenizer=byte_tokenizer(),
        train__max_steps=25, optim__learning_rate=2e-2,
    )  # fmt: skip
    rewards = [row["reward"] for row in result.metrics]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_an_optimizer_that_leaves_parameters_out_is_refused(tiny_recipe: dict[str, Any]) -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=0.1)
    with pytest.raises(UserError, match=r"leaves out \d+ trainable parameters"):
        run(tiny_recipe, model=model, tokenizer=byte_tokenizer(), optimizer=optimizer)


def test_a_finished_run_resumes_to_itself_and_goes_on_with_more_steps(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["optim"]["scheduler"] = "constant"
    first = run(tiny_recipe)
    same = run(tiny_recipe, resume=True)
    assert same.metrics == first.metrics
    longer = run(tiny_recipe, resume=True, train__max_steps=5)
    assert longer.metrics[:3] == first.metrics
    assert [row["step"] for row in longer.metrics] == [1, 2, 3, 4, 5]
    straight = run(tiny_recipe, train__max_steps=5, train__output_dir=str(first.output_dir) + "-straight")
    for name, value in weights_of(longer).items():
        assert torch.equal(straight.model.state_dict()[name], value), name


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_more_steps_for_a_finished_run_follow_the_longer_schedule_at_once(
    tiny_recipe: dict[str, Any], scheduler: str
) -> None:
    tiny_recipe["optim"]["scheduler"] = scheduler
    finished = weights_of(run(tiny_recipe))
    straight = run(tiny_recipe, train__max_steps=6, train__output_dir=tiny_recipe["train"]["output_dir"] + "-2")
    fourth = run(tiny_recipe, resume=True, train__max_steps=6, callbacks=[StopAfter(4)])
    rate = fourth.metrics[3]["learning_rate"]
    assert rate == straight.metrics[3]["learning_rate"] == pytest.approx(5e-4)
    moved = [(value - finished[name]).abs().max() for name, value in weights_of(fourth).items()]
    assert max(moved) > rate / 4, "the rate that is told is the one that is used"


class StopAfter(grpo_cli.Callback):
    """End the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: Any) -> None:
        state.stop = state.step == self.step


def test_evaluation_does_not_depend_on_the_prompts_of_a_step(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny_recipe["data"]["eval"] = {"name": tiny_recipe["data"]["name"]}
    tiny_recipe["train"]["max_steps"] = 1
    tiny_recipe["optim"]["learning_rate"] = 1e-12
    rewards = [
        run(tiny_recipe, train__prompts_per_step=size, train__output_dir=str(tmp_path / str(size))).metrics[0]
        for size in (3, 4)
    ]
    assert rewards[0]["eval_reward"] == rewards[1]["eval_reward"]


def test_a_callback_that_stops_the_run_still_gets_its_evaluation(tiny_recipe: dict[str, Any]) -> None:
    class Stop(grpo_cli.Callback):
        def on_step_end(self, state: Any) -> None:
            state.stop = True

    tiny_recipe["data"]["eval"] = {"name": tiny_recipe["data"]["name"]}
    result = run(tiny_recipe, callbacks=[Stop()])
    assert len(result.metrics) == 1
    assert "eval_reward" in result.metrics[0]


class FailsAtTheEnd:
    def on_train_end(self, state: Any) -> None:
        raise OSError("no disk")


def fails_when_shown(completions: list[str]) -> list[float]:
    """After training one completion for each of three prompts is scored to be shown."""
    if len(completions) == 3:
        raise ValueError("the judge is gone")
    return [float(len(completion)) for completion in completions]


def test_what_fails_after_the_last_step_is_told_and_the_run_is_done(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(tracker: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(TensorBoardTracker, "finish", finish)
    screen = Console(file=io.StringIO())
    logging = {"logging__trackers": ["tensorboard"], "logging__print_completions": 100}
    result = run(tiny_recipe, rewards=[fails_when_shown], callbacks=[FailsAtTheEnd()], console=screen, **logging)
    assert (result.output_dir / "final" / "config.json").is_file()
    assert [row["step"] for row in result.metrics] == [1, 2, 3]
    told = [line for line in screen.file.getvalue().splitlines() if line.startswith("at the end of the run: ")]
    for line, what in zip(told, ("no disk", "the judge is gone", "ConnectionError: no network"), strict=True):
        assert what in line


class DamagesTheMetrics:
    def on_train_end(self, state: Any) -> None:
        with (state.output_dir / "metrics.jsonl").open("a") as file:
            file.write("{half a row\n")


def test_metrics_that_cannot_be_read_at_the_end_are_told_and_the_run_is_done(tiny_recipe: dict[str, Any]) -> None:
    screen = Console(file=io.StringIO(), width=1000)
    result = run(tiny_recipe, callbacks=[DamagesTheMetrics()], console=screen)
    assert (result.output_dir / "final" / "config.json").is_file()
    assert result.metrics == []
    assert "metrics.jsonl:4: is damaged" in screen.file.getvalue()
    assert f"final model:  {result.output_dir / 'final'}" in screen.file.getvalue()
