"""What lasts over the steps of a run: position, metrics, files, screen, callbacks, checkpoints, stop requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import ServerLost, StoppedEarly
from grpo_cli.recipe.schema import Recipe
from grpo_cli.record.completions import completions_file, read_completions
from grpo_cli.record.metrics import METRICS, Metrics, read_metrics
from grpo_cli.train.callbacks import TrainState, check_callback, load_callbacks, notify
from grpo_cli.train.checkpoint import Position, checkpoint_path, load_checkpoint, save_checkpoint
from grpo_cli.train.disk import explained, writing
from grpo_cli.train.display import Display
from grpo_cli.train.learner import Learner
from grpo_cli.train.metrics import MetricsFile, StepClock, check_record
from grpo_cli.train.rollouts import Rollouts
from grpo_cli.train.run_folder import folder_of, hold_run_folder, open_run_folder, whole_checkpoint
from grpo_cli.train.run_lock import RunLock
from grpo_cli.train.signals import StopRequest
from grpo_cli.train.step_data import StepData
from grpo_cli.train.stored_completions import remove_completions_after, save_completions
from grpo_cli.train.token_texts import TokenTexts
from grpo_cli.train.tracked_run import completions_table
from grpo_cli.train.trackers import Trackers
from grpo_cli.train.whole_files import sync


class Recorder:
    """Keeps a run's record; `open` comes first, and `close` last.

    Args:
        recipe: of the run.
        rollouts: whose phases are timed, and which evaluate.
        learner: what the callbacks see.
        callbacks: a Python caller's, beside the recipe's.
        stop_request: set by signals.
        display: the screen.

    Raises:
        UserError: a callback cannot be loaded.
    """

    def __init__(
        self,
        recipe: Recipe,
        rollouts: Rollouts,
        learner: Learner,
        callbacks: Sequence[Any],
        stop_request: StopRequest,
        display: Display,
    ) -> None:
        self.recipe = recipe
        self.folder = folder_of(recipe)
        self.max_steps = rollouts.max_steps
        self.clock = rollouts.clock
        self._rollouts = rollouts
        self.display = display
        self.position = Position()
        self.resumed_from: Path | None = None
        self.is_done = False
        """Whether the final model is written."""
        self.state = TrainState(recipe, learner.model, learner.tokenizer, self.folder, self.max_steps)
        self._ranks: Ranks = learner.ranks
        self._stop_request = stop_request
        given = [check_callback(callback, "callbacks") for callback in callbacks]
        self._callbacks = [*load_callbacks(recipe.train.callbacks), *given]
        has_eval = rollouts.eval_dataset is not None
        self._evaluate: Callable[[int], Metrics] | None = rollouts.evaluate if has_eval else None
        self._reward_names = rollouts.scorer.names
        self._token_texts = TokenTexts(learner.tokenizer)
        self._metrics_file: MetricsFile | None = None  # of rank 0, as the trackers
        self._trackers: Trackers | None = None
        self._lock: RunLock | None = None
        self._synced_steps = 0

    def open(self, learner: Learner) -> None:
        """Enter the run's folder, restore its last whole checkpoint, and remove what was written of later steps.

        Raises:
            UserError: the folder cannot be written to, or another run holds it.
            RunError: no checkpoint is whole.
        """

        def enter() -> None:
            self._lock = hold_run_folder(self.recipe, self.display.note)
            open_run_folder(self.recipe, self.display.note)

        self._ranks.led(enter)
        self.resumed_from = whole_checkpoint(self.folder, self._ranks, self.display.note)
        if self.resumed_from is not None:
            self._ranks.led(partial(check_record, self.resumed_from, self.folder / METRICS, self.display.note))
            self.position = load_checkpoint(self.resumed_from, learner)
            self._rollouts.num_tokens = self.position.num_tokens
        if self._ranks.is_main:
            steps_done = self._synced_steps = self.position.step
            remove_completions_after(self.folder, steps_done)
            self._metrics_file = MetricsFile(self.folder / METRICS, steps_done)
            steps_logged = max(steps_done, self._metrics_file.steps_before)
            self._trackers = Trackers(self.recipe, steps_done, steps_logged, self.display.note)
            self.display.resume(steps_done, [row.get("reward") for row in self.history()])

    def start(self) -> None:
        """Tell the callbacks, and evaluate what a lost server has left without.

        Raises:
            ServerLost: it is still away.
        """
        self.state.step = self.position.step
        self.notify("on_train_start")
        if self.resumed_from is None or self._evaluate is None:
            return
        row = self._ranks.led(self._last_row)
        if row is None or not self._wants_evaluation(row["step"]) or any(name.startswith("eval_") for name in row):
            return
        self.state.metrics = row
        evaluation = self._evaluation(self._evaluate)
        if self._metrics_file is not None and self._trackers is not None:
            self._metrics_file.amend(evaluation)
            self._trackers.amend(evaluation, row["step"])

    def _last_row(self) -> dict[str, Any] | None:
        """Of the checkpoint's position, if there is one."""
        rows = self.history()
        return rows[-1] if rows and rows[-1]["step"] == self.position.step else None

    def _wants_evaluation(self, step: int) -> bool:
        return step == self.max_steps or _is_due(step, self.recipe.train.eval_every)

    def _evaluation(self, evaluate: Callable[[int], Metrics]) -> Metrics:
        """The metrics of the present weights on the held-out prompts, of which the callbacks are told."""
        clock = StepClock()
        with clock("eval"):
            metrics = evaluate(self.position.step)
        evaluation = metrics | {"time/eval": clock.seconds["eval"]}
        self.state.metrics |= evaluation
        self.notify("on_evaluate")
        return evaluation

    def notify(self, event: str) -> None:
        """Call the callbacks, on rank 0; what they ask for holds for all.

        Raises:
            RunError: a callback raised.
        """

        def tell_callbacks() -> bool:
            notify(self._callbacks, event, self.state)
            return self.state.stop

        self.state.stop = self._ranks.led(tell_callbacks)

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 0. All randomness of one follows from (seed, step)."""
        for step in range(self.position.step, self.max_steps):
            seeds = np.random.SeedSequence([self.recipe.train.seed, step])
            set_seed(int(seeds.generate_state(1)[0]))
            self.clock.reset()
            yield step
            if self.state.stop:
                return

    def finish(self, data: StepData, learner: Learner) -> None:
        """Evaluate, log, checkpoint, and stop if asked to, in this order.

        Raises:
            StoppedEarly: after its checkpoint was written.
            ServerLost: a rollout server stays away; the step is logged, and evaluated after a resume.
            RunError: a checkpoint could not be written.
        """
        num_tokens = data.rollout.num_tokens()
        self.position = self.position.advance(num_tokens)
        self._rollouts.num_tokens = self.position.num_tokens
        step = self.state.step = self.position.step
        numbers = {"step": step, "epoch": data.epoch, "num_tokens": self.position.num_tokens}
        of_step = learner.take_metrics() | data.metrics
        self.state.metrics = numbers | of_step | self.clock.result(num_tokens)
        policy_logprobs = learner.take_logprobs(data)
        if self._ranks.is_main:
            texts = [self._token_texts(one.token_ids) for one in data.rollout.completions]
            save_completions(
                self.folder, step, data.rollout, self._reward_names, data.rewards, data.advantages,
                extras=data.extras, token_texts=texts, policy_logprobs=policy_logprobs,
            )  # fmt: skip
        self.notify("on_step_end")
        is_last = step == self.max_steps or self.state.stop
        lost: ServerLost | None = None
        if self._evaluate is not None and (self.state.stop or self._wants_evaluation(step)):
            try:
                self._evaluation(self._evaluate)
            except ServerLost as error:
                lost = error
        self._log(data)
        if lost is not None:
            raise lost
        stop = next(filter(None, self._ranks.gather(self._stop_request.name)), None)
        save_every = self.recipe.train.save_every
        if stop or _is_due(step, save_every) or (save_every and is_last):
            self.save_checkpoint(learner)
        if stop and step < self.max_steps:
            raise StoppedEarly(f"{stop}: stopped after step {step}; continue with --resume")

    def _log(self, data: StepData) -> None:
        if self._metrics_file is None or self._trackers is None:
            return
        step, metrics = self.position.step, self.state.metrics
        shows_completions = _is_due(step, self.recipe.logging.print_completions)
        self._metrics_file.append(metrics)
        table = None
        if shows_completions and self._trackers.show_tables:
            group_size = self.recipe.generation.num_generations
            table = completions_table(read_completions(self.folder, step, group_size, with_tokens=False))
        self._trackers.log(metrics, step, table)
        self.display.step(metrics)
        if shows_completions:
            self.display.completions(f"step {step}", data.rollout, self._reward_names, data.rewards)

    def save_checkpoint(self, learner: Learner) -> None:
        """Write a checkpoint of the position between two steps.

        Raises:
            RunError: the disk refused; earlier checkpoints are as they were.
        """
        if self.resumed_from == checkpoint_path(self.folder, self.position):
            return  # nothing has happened since it was written
        self._ranks.led(self._sync_record)
        keep = self.recipe.train.keep_checkpoints
        path = save_checkpoint(self.folder, learner, self.position, keep, self.display.note)
        self.display.note(f"checkpoint written: {path}")
        self.notify("on_checkpoint")

    def _sync_record(self) -> None:
        """Flush what the steps up to here have left: after their checkpoint they are not run again."""
        files = [self.folder / METRICS]
        for step in range(self._synced_steps + 1, self.position.step + 1):
            files.append(completions_file(self.folder, step))
        with explained(self.folder):
            if self._lock is not None:
                self._lock.keep()
            for path in dict.fromkeys([*files, *(file.parent for file in files)]):
                with writing(path):
                    sync(path)
        self._synced_steps = self.position.step

    def history(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; none on other ranks than 0, or if it cannot be read any more.

        They are read when asked for: kept, they would take memory with every step.
        """
        with self.display.noting():
            if self._metrics_file is not None:
                return read_metrics(self._metrics_file.path)
        return []

    def close(self) -> None:
        if self._trackers is not None:
            with self.display.noting(), explained(self.folder):
                self._trackers.finish(self.is_done)
        if self._lock is not None:
            self._lock.close()


def _is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps, or never (0 or None), happens after this one."""
    return every is not None and every > 0 and step % every == 0
