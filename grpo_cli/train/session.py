"""What lasts over the steps of a run: optimizer, position, files, screen, callbacks and signals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grpo_cli.errors import ServerLost, StoppedEarly
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.callbacks import TrainState, check_callback, load_callbacks, notify
from grpo_cli.train.checkpoint import Position, load_checkpoint, open_run_folder, save_checkpoint
from grpo_cli.train.display import Display
from grpo_cli.train.evaluate import evaluate
from grpo_cli.train.metrics import Metrics, MetricsFile, StepClock
from grpo_cli.train.optim import build_optimizer, build_scheduler, check_coverage
from grpo_cli.train.run import Objects, Run
from grpo_cli.train.signals import StopRequest
from grpo_cli.train.trackers import Trackers, remove_completions_after, save_completions


class Session:
    """Opens the run's folder and restores its last checkpoint.

    Args:
        run: the parts of the run.
        objects: the Python caller's optimizer and callbacks.
        stop_request: set by signals.
        display: the screen.

    Raises:
        UserError: the folder cannot be written to, or a callback cannot be loaded.
    """

    def __init__(self, run: Run, objects: Objects, stop_request: StopRequest, display: Display) -> None:
        self.run = run
        train = run.recipe.train
        paths = load_callbacks(train.callbacks)
        given = [check_callback(callback, "callbacks") for callback in objects.callbacks]
        self.callbacks = [*paths, *given]
        optimizer = objects.optimizer or build_optimizer(run.model, run.recipe.optim)
        check_coverage(run.model, optimizer)
        steps = run.max_steps * train.num_iterations * train.optimizer_steps_per_rollout
        self.optimizer = run.accelerator.prepare_optimizer(optimizer)
        self.scheduler = build_scheduler(optimizer, run.recipe.optim, steps)
        self.position = Position()
        checkpoint = open_run_folder(run.recipe)
        if checkpoint is not None:
            self.position = load_checkpoint(checkpoint, run.model, self.optimizer, self.scheduler)
        self.resumed_from = checkpoint
        remove_completions_after(run.folder, self.position.step)
        self.metrics_file = MetricsFile(run.folder / "metrics.jsonl", self.position.step)
        self.trackers = Trackers(run.recipe, self.position.step)
        self.display = display
        self.stop_request = stop_request
        self.state = TrainState(run.recipe, run.model, run.tokenizer, run.folder, run.max_steps)

    def start(self) -> None:
        self.state.step = self.position.step
        notify(self.callbacks, "on_train_start", self.state)

    def finish_step(
        self,
        metrics: Metrics,
        clock: StepClock,
        rollout: Rollout,
        rewards: torch.Tensor,
        advantages: torch.Tensor,
    ) -> None:
        """Evaluate, log, checkpoint, and stop if asked to, in this order.

        Raises:
            StoppedEarly: after its checkpoint was written.
            ServerLost: a rollout server stays away; the step is logged, without its evaluation.
            RunError: a checkpoint could not be written.
        """
        run, step = self.run, self.position.step
        numbers = {"step": step, "epoch": run.sampler.epoch(step), "num_tokens": self.position.num_tokens}
        self.state.step = step
        self.state.metrics = numbers | metrics | clock.result(rollout.num_tokens())
        save_completions(run.folder, step, rollout, run.scorer.names, rewards, advantages)
        notify(self.callbacks, "on_step_end", self.state)
        is_last = step == run.max_steps or self.state.stop
        lost: ServerLost | None = None
        if run.eval_dataset is not None and (is_last or _is_due(step, run.recipe.train.eval_every)):
            try:
                self.state.metrics |= self._evaluate(step)
                notify(self.callbacks, "on_evaluate", self.state)
            except ServerLost as error:
                lost = error
        self.metrics_file.append(self.state.metrics)
        self.trackers.log(self.state.metrics, step)
        self.display.step(self.state.metrics)
        if _is_due(step, run.recipe.logging.print_completions):
            self.display.completions(f"step {step}", rollout, run.scorer.names, rewards)
        if lost is not None:
            raise lost
        stop = self.stop_request.name
        save_every = run.recipe.train.save_every
        if stop or _is_due(step, save_every) or (save_every and is_last):
            self.save_checkpoint()
        if stop and step < run.max_steps:
            raise StoppedEarly(f"{stop}: stopped after step {step}; continue with --resume")

    def _evaluate(self, step: int) -> Metrics:
        run = self.run
        assert run.eval_dataset is not None
        clock = StepClock()
        with clock("eval"):
            run.engine.update_weights(step)
            metrics = evaluate(
                run.engine,
                run.scorer,
                run.eval_dataset,
                seed=run.recipe.train.seed,
                step=step,
                num_generations=run.recipe.generation.num_generations,
                prompts_per_batch=run.recipe.train.prompts_per_step,
            )
            run.engine.release_memory()
        return metrics | {"time/eval": clock.seconds["eval"]}

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the position between two steps.

        Raises:
            RunError: the disk refused; earlier checkpoints are as they were.
        """
        path = save_checkpoint(
            self.run.folder,
            self.position,
            self.run.model,
            self.run.tokenizer,
            self.optimizer,
            self.scheduler,
            keep=self.run.recipe.train.keep_checkpoints,
        )
        self.display.note(f"checkpoint written: {path}")
        notify(self.callbacks, "on_checkpoint", self.state)

    def close(self) -> None:
        self.trackers.finish()


def _is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps, or never (0 or None), happens after this one."""
    return every is not None and every > 0 and step % every == 0


def mean_reward(rows: Sequence[dict[str, Any]]) -> float:
    """Mean of the `reward` of some metrics rows, those without one left out."""
    values = [row["reward"] for row in rows if row["reward"] is not None]
    return sum(values) / len(values) if values else float("nan")
