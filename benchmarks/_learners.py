"""The worker processes of `learning_vs_trl`: a recipe trained by TRL's GRPOTrainer or by ours, step by step."""

from __future__ import annotations

import importlib
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from benchmarks._models import load
from benchmarks._workers import Channel
from grpo_cli.data.rows import load_rows
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import Recipe
from grpo_cli.reward.registry import resolve_rewards

METRICS = ("reward", "reward_std", "loss", "grad_norm", "learning_rate", "entropy", "completions/mean_length")
"""Of each step, under the names that both systems give them."""


@dataclass(frozen=True)
class Spec:
    """What a worker is to do."""

    system: str
    recipe: str
    seed: int
    device: str


class StepReports:
    """Lets the training loop do a step when the parent asks for one, and answers with its metrics."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._started = (0.0, 0.0)

    def wait(self) -> None:
        self._channel.receive()
        self._started = time.perf_counter(), time.process_time()

    def answer(self, metrics: dict[str, Any]) -> None:
        seconds, cpu_seconds = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        values = {name: float(metrics[name]) for name in METRICS}
        self._channel.send(seconds=seconds, cpu_seconds=cpu_seconds, **values)


def run_ours(spec: Spec, reports: StepReports, folder: str) -> None:
    """`grpo train` with a callback that waits before each step."""
    from rich.console import Console

    from grpo_cli.train.api import train
    from grpo_cli.train.callbacks import Callback, TrainState

    class Reporting(Callback):
        def on_train_start(self, state: TrainState) -> None:
            reports.answer(dict.fromkeys(METRICS, 0.0))
            reports.wait()

        def on_step_end(self, state: TrainState) -> None:
            reports.answer(state.metrics)
            if state.step < state.max_steps:
                reports.wait()

    quiet = ["train.save_every=0", "logging.trackers=[]", "logging.print_completions=0"]
    train(
        spec.recipe,
        callbacks=[Reporting()],
        overrides=[f"train.output_dir={folder}", f"train.seed={spec.seed}", *quiet],
        console=Console(quiet=True),
    )


def run_trl(spec: Spec, reports: StepReports, folder: str) -> None:
    """`GRPOTrainer.train` on the same recipe, with a callback that waits before each step."""
    from datasets import Dataset
    from transformers import TrainerCallback

    trl: Any = importlib.import_module("trl")  # the `bench` extra
    recipe = load_recipe(spec.recipe)

    class Reporting(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            reports.answer(dict.fromkeys(METRICS, 0.0))

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            reports.wait()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "reward" in logs:
                reports.answer(logs)

    model, tokenizer = load(recipe.model.name)
    rows = load_rows(recipe.data, setting="data")
    trainer = trl.GRPOTrainer(
        model,
        [function.call for function in resolve_rewards(recipe.rewards)],
        args=trl.GRPOConfig(**trl_arguments(recipe, spec, folder)),
        train_dataset=Dataset.from_list([{"prompt": rows.content(row)} for row in range(len(rows))]),
        processing_class=tokenizer,
        callbacks=[Reporting()],
    )
    trainer.train()


def trl_arguments(recipe: Recipe, spec: Spec, folder: str) -> dict[str, Any]:
    """The recipe in the words of TRL's GRPOConfig: a group is a micro-batch, a step accumulates all of its groups.

    Raises:
        ValueError: the recipe sets something that is not translated.
    """
    generation, train, optim = recipe.generation, recipe.train, recipe.optim
    translated = {
        "model": {"name"},
        "data": {"name", "system_prompt"},
        "generation": {"num_generations", "max_completion_tokens", "temperature"},
        "optim": {"learning_rate", "scheduler", "weight_decay", "max_grad_norm", "warmup_ratio"},
        "train": {"output_dir", "max_steps", "prompts_per_step", "save_every", "keep_checkpoints", "seed"},
        "loss": {"type", "beta", "scale_rewards"},
    }
    for section, names in translated.items():
        extra = set(getattr(recipe, section).model_dump(exclude_defaults=True)) - names
        if extra:
            raise ValueError(f"{spec.recipe}: {section}.{min(extra)} is not translated into TRL's words")
    on_cpu = spec.device == "cpu"
    return {
        "output_dir": folder,
        "seed": spec.seed,
        "max_steps": train.max_steps,
        "per_device_train_batch_size": generation.num_generations,
        "gradient_accumulation_steps": train.prompts_per_step,
        "num_generations": generation.num_generations,
        "max_completion_length": generation.max_completion_tokens,
        "temperature": generation.temperature,
        "beta": recipe.loss.beta,
        "loss_type": recipe.loss.type,
        "scale_rewards": recipe.loss.scale_rewards,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": optim.scheduler,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "warmup_steps": round(optim.warmup_ratio * (train.max_steps or 0)),
        "gradient_checkpointing": False,
        "bf16": not on_cpu,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def serve() -> None:
    """Be the worker that the first message asks for."""
    channel = Channel()
    spec = Spec(**channel.receive())
    with tempfile.TemporaryDirectory() as folder:
        (run_trl if spec.system == "TRL" else run_ours)(spec, StepReports(channel), folder)


if __name__ == "__main__":
    serve()
