"""The workers of `updates_vs_trl`: TRL trains and writes down what it did; ours trains on its completions."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._learners import Spec as TrainingSpec
from benchmarks._learners import trl_arguments
from benchmarks._models import load
from benchmarks._workers import Channel
from grpo_cli.data.prompts import Prompt
from grpo_cli.data.rows import load_rows
from grpo_cli.recipe.load import load_recipe
from grpo_cli.reward.registry import resolve_rewards
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey, decoded

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Spec:
    """What a worker is to do."""

    system: str
    recipe: str
    seed: int
    steps: int
    folder: str
    """TRL writes its steps there, ours reads them."""
    device: str


@dataclass(frozen=True)
class TrlStep:
    """What TRL did in a step."""

    prompts: list[Any]
    """Of each group, as rewards see them."""
    prompt_ids: list[list[int]]
    """Of each group."""
    completion_ids: list[list[int]]
    """Of each completion, those of a group side by side."""
    reward: float
    loss: float
    gradient: Tensors
    """Before clipping."""
    clipped: Tensors
    """What the optimizer was given."""
    weights: Tensors
    """Afterwards."""

    @staticmethod
    def path(folder: str, step: int) -> Path:
        return Path(folder, f"{step}.pt")

    def save(self, folder: str, step: int) -> None:
        torch.save(vars(self), self.path(folder, step))

    @classmethod
    def read(cls, folder: str, step: int) -> TrlStep:
        return cls(**torch.load(cls.path(folder, step), weights_only=False, mmap=True))


@dataclass(frozen=True)
class StepDifference:
    """Of our step from TRL's; relative ones are norms of differences over norms."""

    reward: float
    loss: float
    gradient_norm: float
    """TRL's, before clipping."""
    gradient: float
    """Relative, of the whole gradient."""
    worst_gradient: float
    """Relative, of the parameter that differs most."""
    clipped: float
    """Relative, of the whole clipped gradient."""
    update: float
    """Relative, of all the weights' changes since the start."""
    weight: float
    """Mean of the absolute differences of all weights."""


def copies(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items() if value is not None}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return copies({name: parameter.grad for name, parameter in model.named_parameters()})


def norm(tensors: Tensors) -> float:
    return torch.stack([value.double().norm() for value in tensors.values()]).norm().item()


def difference(ours: Tensors, theirs: Tensors) -> dict[str, torch.Tensor]:
    """Elementwise, by name.

    Raises:
        ValueError: one has a name that the other has not.
    """
    if set(ours) != set(theirs):
        raise ValueError(f"only one of the two has {min(set(ours) ^ set(theirs))}")
    return {name: ours[name].double() - theirs[name].double() for name in theirs}


def train_trl(spec: Spec) -> None:
    """Train with GRPOTrainer and write every step down."""
    from datasets import Dataset
    from transformers import TrainerCallback

    trl: Any = importlib.import_module("trl")  # the `bench` extra
    recipe = load_recipe(spec.recipe)
    group_size = recipe.generation.num_generations
    kept: dict[str, Any] = {}

    class Keeping(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            kept["clipped"] = gradients(model)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            kept["weights"] = copies(dict(model.named_parameters()))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "reward" in logs:
                step = TrlStep(reward=float(logs["reward"]), loss=float(kept.pop("loss")), **kept)
                step.save(spec.folder, state.global_step)
                control.should_training_stop = state.global_step >= spec.steps

    model, tokenizer = load(recipe.model.name)
    rows = load_rows(recipe.data, setting="data")
    training = TrainingSpec("TRL", spec.recipe, spec.seed, spec.device)
    trainer = trl.GRPOTrainer(
        model,
        [function.call for function in resolve_rewards(recipe.rewards)],
        args=trl.GRPOConfig(**trl_arguments(recipe, training, spec.folder)),
        train_dataset=Dataset.from_list([{"prompt": rows.content(row)} for row in range(len(rows))]),
        processing_class=tokenizer,
        callbacks=[Keeping()],
    )
    generate, clip, compute_loss = (
        trainer._generate_and_score_completions,
        trainer.accelerator.clip_grad_norm_,
        trainer.compute_loss,
    )

    def keep_completions(inputs: Any) -> Any:
        outputs = generate(inputs)
        prompts, completions = (
            [
                ids[mask.bool()].tolist()
                for ids, mask in zip(outputs[f"{part}_ids"], outputs[f"{part}_mask"], strict=True)
            ]
            for part in ("prompt", "completion")
        )
        kept["prompts"] = [row["prompt"] for row in inputs[::group_size]]
        kept["prompt_ids"], kept["completion_ids"] = prompts[::group_size], completions
        return outputs

    def keep_gradient(parameters: Any, *arguments: Any, **options: Any) -> Any:
        kept["gradient"] = gradients(trainer.model)
        return clip(parameters, *arguments, **options)

    def keep_loss(*arguments: Any, **options: Any) -> Any:
        loss = compute_loss(*arguments, **options)
        kept["loss"] = kept.get("loss", 0.0) + loss.item()
        return loss

    trainer._generate_and_score_completions = keep_completions
    trainer.accelerator.clip_grad_norm_ = keep_gradient
    trainer.compute_loss = keep_loss
    trainer.train()


class ReplayEngine:
    """Gives the completions of TRL's steps, one step after the other."""

    def __init__(self, steps: Sequence[TrlStep], tokenizer: Any) -> None:
        self._steps = iter(steps)
        self._tokenizer = tokenizer

    def update_weights(self, version: int) -> int:
        return 0

    def release_memory(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        step = next(self._steps)
        if [prompt.token_ids for prompt in prompts] != step.prompt_ids:
            raise RuntimeError("the prompts are not cut into the tokens that TRL cuts them into")
        completions = [self._completion(ids) for ids in step.completion_ids]
        starts = range(0, len(completions), num_generations)
        return [completions[start : start + num_generations] for start in starts]

    def _completion(self, ids: list[int]) -> Completion:
        is_finished = ids[-1] == self._tokenizer.eos_token_id
        text = decoded(self._tokenizer, ids, [])
        return Completion(ids, [float("nan")] * len(ids), "stop" if is_finished else "length", text)


def train_ours(spec: Spec, channel: Channel) -> None:
    """Train on the completions that TRL made; send the difference of each step."""
    from rich.console import Console

    from grpo_cli.train.api import train
    from grpo_cli.train.callbacks import Callback, TrainState
    from grpo_cli.train.optim import build_optimizer

    steps = [TrlStep.read(spec.folder, step + 1) for step in range(spec.steps)]
    seen: dict[str, Tensors] = {}

    class Comparing(Callback):
        def on_train_start(self, state: TrainState) -> None:
            for name, parameter in state.model.named_parameters():
                parameter.register_post_accumulate_grad_hook(partial(keep_gradient, name))

        def on_step_end(self, state: TrainState) -> None:
            theirs = steps[state.step - 1]
            weights = copies(dict(state.model.named_parameters()))
            channel.send(**asdict(compare(theirs, state.metrics, seen, weights, start)))
            state.stop = state.step == spec.steps

    recipe = load_recipe(spec.recipe)
    model, tokenizer = load(recipe.model.name)
    start = copies(dict(model.named_parameters()))
    data = [{"prompt": prompt} for step in steps for prompt in step.prompts]
    optimizer = build_optimizer(model, recipe.optim, lambda tensor: tensor.shape)
    gradient: dict[str, torch.Tensor] = {}

    def keep_gradient(name: str, parameter: torch.Tensor) -> None:
        """What has been added up so far; after a step's last pack all of it, not clipped yet."""
        assert parameter.grad is not None
        gradient[name] = parameter.grad.detach().clone()

    def keep_clipped(*_: Any) -> None:
        seen["gradient"], seen["clipped"] = dict(gradient), gradients(model)

    optimizer.register_step_pre_hook(keep_clipped)
    quiet = ["train.save_every=0", "logging.trackers=[]", "logging.print_completions=0", "data.shuffle=false"]
    own_prompts = ["data.system_prompt=null", f"train.output_dir={spec.folder}/ours"]
    train(
        spec.recipe,
        model=model,
        tokenizer=tokenizer,
        train_data=data,
        callbacks=[Comparing()],
        optimizer=optimizer,
        engine=ReplayEngine(steps, tokenizer),
        overrides=[*quiet, *own_prompts],
        console=Console(quiet=True),
    )


def compare(
    theirs: TrlStep, metrics: Mapping[str, float], seen: Mapping[str, Tensors], weights: Tensors, start: Tensors
) -> StepDifference:
    """Our step beside TRL's."""
    by_parameter = difference(seen["gradient"], theirs.gradient)
    apart = difference(weights, theirs.weights)
    return StepDifference(
        reward=abs(metrics["reward"] - theirs.reward),
        loss=abs(metrics["loss"] - theirs.loss),
        gradient_norm=norm(theirs.gradient),
        gradient=norm(by_parameter) / norm(theirs.gradient),
        worst_gradient=max(
            (by_parameter[name].norm() / theirs.gradient[name].double().norm()).item() for name in by_parameter
        ),
        clipped=norm(difference(seen["clipped"], theirs.clipped)) / norm(theirs.clipped),
        update=norm(apart) / norm(difference(theirs.weights, start)),
        weight=sum(value.abs().sum().item() for value in apart.values())
        / sum(value.numel() for value in apart.values()),
    )


def serve() -> None:
    """Be the worker that the first message asks for."""
    channel = Channel()
    spec = Spec(**channel.receive())
    if spec.system == "TRL":
        train_trl(spec)
        channel.send(done=True)
    else:
        train_ours(spec, channel)


if __name__ == "__main__":
    serve()
