"""The worker processes of `step_vs_trl`: TRL's training loop and ours, paused between steps."""

from __future__ import annotations

import importlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks._models import ModelSize, load, random_prompts
from benchmarks._workers import Channel, peak_memory

WARM_UP_PROMPT = 16
"""Tokens of each prompt in the first step, which is not measured. A GPU compiles for lengths, so there it is like
the others."""
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Spec:
    """What a worker is to do."""

    system: str
    model: str
    device: str
    prompt: int
    completion: int
    group_size: int
    prompts: int
    steps: int
    """The warm-up step included."""
    trl_batch: int
    """Completions of a micro-batch of TRL."""

    @property
    def warm_up_prompt(self) -> int:
        return self.prompt if self.device == "cuda" else WARM_UP_PROMPT

    def texts(self, tokenizer: Any) -> list[str]:
        """The prompts of all steps, in order; the first step's are short on a CPU."""
        warm_up = random_prompts(tokenizer, self.prompts, self.warm_up_prompt, seed=0)
        return warm_up + random_prompts(tokenizer, self.prompts * (self.steps - 1), self.prompt, seed=1)

    def check(self, step: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Refuse a step (the first is 1) whose prompts and completions are not as long as they have to be.

        Raises:
            RuntimeError: they are not.
        """
        rows = self.prompts * self.group_size
        expected = rows * (self.warm_up_prompt if step == 1 else self.prompt), rows * self.completion
        if (prompt_tokens, completion_tokens) != expected:
            raise RuntimeError(f"{prompt_tokens} prompt and {completion_tokens} completion tokens, not {expected}")


def noisy_length(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that differs within every group, so that no completion is without an advantage."""
    return [len(completion) / 1000 + random.random() for completion in completions]


class Pauses:
    """Stops a training loop before each step until the parent asks for it, and tells the parent what it took."""

    def __init__(self, channel: Channel, spec: Spec) -> None:
        self._channel = channel
        self._device = spec.device
        self._start = 0.0

    def ready(self, model: Any) -> None:
        self._channel.send(**asdict(ModelSize.of(model)))

    def before_step(self) -> None:
        self._channel.receive()
        self._start = self.now()

    def after_step(self, generate: float, train: float | None, reward: float = 0.0) -> None:
        """Training is what is left of the step where its seconds are not known."""
        step = self.now() - self._start
        self._channel.send(
            step=step,
            generate=generate,
            train=step - generate - reward if train is None else train,
            peak=peak_memory(self._device),
        )

    def now(self) -> float:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def run_ours(spec: Spec, channel: Channel, folder: str) -> None:
    """`grpo train`, with a callback that pauses it and an engine whose completions never end by themselves."""
    from rich.console import Console

    from grpo_cli.train.api import train
    from grpo_cli.train.callbacks import Callback, TrainState

    pauses = Pauses(channel, spec)

    class Pausing(Callback):
        num_tokens = 0.0

        def on_train_start(self, state: TrainState) -> None:
            pauses.ready(state.model)
            pauses.before_step()

        def on_step_end(self, state: TrainState) -> None:
            metrics = state.metrics
            completion_tokens = round(metrics["completions/mean_length"] * spec.prompts * spec.group_size)
            prompt_tokens = round(metrics["num_tokens"] - self.num_tokens) - completion_tokens
            self.num_tokens = metrics["num_tokens"]
            spec.check(state.step, prompt_tokens, completion_tokens)
            if metrics["frac_reward_zero_std"] > 0:
                raise RuntimeError("a group without advantages was skipped")
            pauses.after_step(metrics["time/generate"], metrics["time/train"])
            pauses.before_step()

    model, tokenizer = load(spec.model)
    data = [{"prompt": text} for text in spec.texts(tokenizer)]

    def never_ending(engine: Any) -> Any:
        engine.eos_token_ids = {model.config.vocab_size}  # no token has this number
        return engine

    train(
        our_recipe(spec, folder),
        model=model,
        tokenizer=tokenizer,
        rewards=noisy_length,
        train_data=data,
        callbacks=[Pausing()],
        engine=never_ending,
        console=Console(quiet=True),
    )


def our_recipe(spec: Spec, folder: str) -> dict[str, Any]:
    return {
        "data": {"shuffle": False},
        "generation": {"num_generations": spec.group_size, "max_completion_tokens": spec.completion},
        "optim": {"learning_rate": LEARNING_RATE},
        "train": {
            "output_dir": folder,
            "max_steps": spec.steps,
            "prompts_per_step": spec.prompts,
            "save_every": 0,
        },
        "logging": {"trackers": []},
    }


def run_trl(spec: Spec, channel: Channel, folder: str) -> None:
    """`GRPOTrainer.train`, with a callback that pauses it."""
    from datasets import Dataset
    from transformers import TrainerCallback

    trl: Any = importlib.import_module("trl")  # the `bench` extra
    pauses = Pauses(channel, spec)
    seconds: dict[str, float] = {}

    class Pausing(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            pauses.before_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            reward = seconds["_generate_and_score_completions"] - seconds["_generate"]
            pauses.after_step(seconds["_generate"], None, reward)

    def timed(trainer: Any, name: str) -> None:
        method = getattr(trainer, name)

        def timing(*args: Any, **kwargs: Any) -> Any:
            start = pauses.now()
            outputs = method(*args, **kwargs)
            seconds[name] = pauses.now() - start
            if name == "_generate":
                prompt_tokens, completion_tokens = (sum(len(row) for row in rows) for rows in outputs[:2])
                spec.check(trainer.state.global_step + 1, prompt_tokens, completion_tokens)
            return outputs

        setattr(trainer, name, timing)

    model, tokenizer = load(spec.model)
    on_cpu = spec.device == "cpu"
    config = trl.GRPOConfig(
        output_dir=folder,
        max_steps=spec.steps,
        per_device_train_batch_size=spec.trl_batch,
        gradient_accumulation_steps=spec.prompts * spec.group_size // spec.trl_batch,
        num_generations=spec.group_size,
        max_completion_length=spec.completion,
        generation_kwargs={"min_new_tokens": spec.completion},
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=LEARNING_RATE,
        gradient_checkpointing=False,
        bf16=not on_cpu,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": text} for text in spec.texts(tokenizer)])
    trainer = trl.GRPOTrainer(
        model, noisy_length, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Pausing()]
    )
    timed(trainer, "_generate")
    timed(trainer, "_generate_and_score_completions")
    pauses.ready(trainer.model)
    trainer.train()


def serve() -> None:
    """Be the worker that the first message asks for."""
    channel = Channel()
    spec = Spec(**channel.receive())
    with tempfile.TemporaryDirectory() as folder:
        (run_trl if spec.system == "TRL" else run_ours)(spec, channel, folder)


if __name__ == "__main__":
    serve()
