"""What lasts over the steps of a run: optimizer, position, files, screen, callbacks and signals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grpo_cli.errors import ServerLost, StoppedEarly
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.callbacks import TrainState, check_callback, load_callbacks, notify
from grpo_cli.train.checkpoint import Position, checkpoint_path, load_checkpoint, open_run_folder, save_checkpoint
from grpo_cli.train.display import Display
from grpo_cli.train.evaluate import evaluate
from grpo_cli.train.metrics import Metrics, MetricsFile, StepClock
from grpo_cli.train.optim import build_scheduler
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
        steps = run.max_steps * train.num_iterations * train.optimizer_steps_per_rollout
        self.scheduler = build_scheduler(run.optimizer, run.recipe.optim, steps)
        self.position = Position()
        checkpoint = run.ranks.led(lambda: open_run_folder(run.recipe, display.note))
        if checkpoint is not None:
            self.position = load_checkpoint(checkpoint, run, self.scheduler)
        self.resumed_from = checkpoint
        self.log = RunLog(run, self.position.step, display) if run.ranks.is_main else None
        self.display = display
        self.stop_request = stop_request
        self.state = TrainState(run.recipe, run.model, run.tokenizer, run.folder, run.max_steps)

    def start(self) -> None:
        self.state.step = self.position.step
        self.notify("on_train_start")

    def notify(self, event: str) -> None:
        """Call the callbacks, on rank 0; what they ask for holds for all.

        Raises:
            RunError: a callback raised.
        """

        def tell_callbacks() -> bool:
            notify(self.callbacks, event, self.state)
            return self.state.stop

        self.state.stop = self.run.ranks.led(tell_callbacks)

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
        if self.log is not None:
            self.log.save_completions(step, rollout, rewards, advantages)
        self.notify("on_step_end")
        is_last = step == run.max_steps or self.state.stop
        lost: ServerLost | None = None
        if run.eval_dataset is not None and (is_last or _is_due(step, run.recipe.train.eval_every)):
            try:
                self.state.metrics |= self._evaluate(step)
                self.notify("on_evaluate")
            except ServerLost as error:
                lost = error
        if self.log is not None:
            self.log.add(self.state.metrics, step, rollout, rewards)
        if lost is not None:
            raise lost
        stop = next(filter(None, run.ranks.gather(self.stop_request.name)), None)
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
                ranks=run.ranks,
            )
            run.engine.release_memory()
        return metrics | {"time/eval": clock.seconds["eval"]}

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the position between two steps.

        Raises:
            RunError: the disk refused; earlier checkpoints are as they were.
        """
        if self.resumed_from is not None and self.resumed_from == checkpoint_path(self.run, self.position):
            return  # nothing has happened since it was written
        path = save_checkpoint(self.run, self.position, self.scheduler, self.display.note)
        self.display.note(f"checkpoint written: {path}")
        self.notify("on_checkpoint")

    def close(self) -> None:
        if self.log is not None:
            with self.display.noting():
                self.log.trackers.finish()


class RunLog:
    """What a run writes of its steps, on rank 0: metrics, completions, the screen.

    Args:
        run: the parts of the run.
        steps_done: what an earlier start wrote for later steps is removed, since they will be run again.
        display: the screen.
    """

    def __init__(self, run: Run, steps_done: int, display: Display) -> None:
        self._run = run
        self._display = display
        remove_completions_after(run.folder, steps_done)
        self.metrics_file = MetricsFile(run.folder / "metrics.jsonl", steps_done)
        self.trackers = Trackers(run.recipe, steps_done)

    def save_completions(
        self, step: int, rollout: Rollout, rewards: torch.Tensor, advantages: torch.Tensor
    ) -> None:
        save_completions(self._run.folder, step, rollout, self._run.scorer.names, rewards, advantages)

    def add(self, metrics: Metrics, step: int, rollout: Rollout, rewards: torch.Tensor) -> None:
        """Log one step."""
        self.metrics_file.append(metrics)
        self.trackers.log(metrics, step)
        self._display.step(metrics)
        if _is_due(step, self._run.recipe.logging.print_completions):
            self._display.completions(f"step {step}", rollout, self._run.scorer.names, rewards)


def _is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps, or never (0 or None), happens after this one."""
    return every is not None and every > 0 and step % every == 0


def mean_reward(rows: Sequence[dict[str, Any]]) -> float:
    """Mean of the `reward` of some metrics rows, those without one left out."""
    values = [row["reward"] for row in rows if row["reward"] is not None]
    return sum(values) / len(values) if values else float("nan")
