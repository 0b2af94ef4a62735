"""Sends metrics to Accelerate's trackers (TensorBoard, Weights & Biases, trackio, ...). On rank 0 only.

A tracker is a copy: one that fails is told of and left, and neither ends nor holds up the run. TensorBoard's files
are the run's own, and a disk that refuses them ends it as it would for `metrics.jsonl`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from grpo_cli.errors import EXPECTED_ERRORS, UserError, one_line
from grpo_cli.recipe.schema import Recipe
from grpo_cli.record.metrics import Metrics
from grpo_cli.report.page import write_report
from grpo_cli.report.run import read_run
from grpo_cli.train.disk import writing
from grpo_cli.train.tracked_run import Table, TrackedRun, begin, remember_failure


def check_trackers(names: Sequence[str]) -> None:
    """See, before anything is loaded, that each of `logging.trackers` can be had.

    Raises:
        UserError: Accelerate does not know one, its package is missing, or it would ask for a key.
    """
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for index, name in enumerate(names):
        if name not in known:
            raise UserError(f"logging.trackers.{index}: {name!r} is not one of {', '.join(known)}")
        if name not in available:
            raise UserError(
                f"logging.trackers.{index}: the package of {name} is not installed; install it, or remove {name}"
            )
        if name == "wandb":
            _check_wandb_key(f"logging.trackers.{index}")


def _check_wandb_key(setting: str) -> None:
    """wandb would ask for a key on a terminal, and a run that nobody watches would wait for the answer."""
    wandb = import_module("wandb")
    advice = "run `wandb login`, or set WANDB_MODE=offline to keep the run on this machine"
    if wandb.run is not None:  # a Python caller's
        return
    try:
        settings = wandb.setup(wandb.Settings(silent=True)).settings
        is_ready = settings.mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise UserError(f"{setting}: wandb: {one_line(error)}; {advice}") from error
    if not is_ready:
        raise UserError(f"{setting}: wandb has no key to send with; {advice}")


_tell = threading.excepthook


def _tell_unless_raised_again(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, unless it is TensorBoard's: the tracker's next `log` raises it again."""
    if type(failure.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        _tell(failure)


class Trackers:
    """The recipe's `logging.trackers`, checked by `check_trackers` before.

    Args:
        recipe: of the run.
        steps_done: that will not be run again.
        steps_logged: that an earlier start of the run has sent, some of which may be run again.
        note: is told where the run can be seen, and which tracker failed.
    """

    def __init__(self, recipe: Recipe, steps_done: int, steps_logged: int, note: Callable[[str], None]) -> None:
        self._folder = Path(recipe.train.output_dir).expanduser()
        self._note = note
        self._runs: dict[str, TrackedRun] = {}
        for name in recipe.logging.trackers:
            if name == "tensorboard":
                threading.excepthook = _tell_unless_raised_again
            with self._left_if_it_fails(name):
                run = self._runs[name] = begin(name, recipe, self._folder, steps_done, steps_logged)
                if run.where:
                    note(run.where)

    @property
    def show_tables(self) -> bool:
        """Whether one of them does."""
        return any(run.package is not None for run in self._runs.values())

    def log(self, metrics: Metrics, step: int, table: Table | None = None) -> None:
        """Send a step, with its completions if a table is given; not to a tracker that has it from before."""
        for name, run in list(self._runs.items()):
            if step > run.has_until:
                self._send(name, run, metrics, step, table)
                if name not in self._runs:
                    with self._left_if_it_fails(name):
                        remember_failure(self._folder, name, step - 1)

    def amend(self, metrics: Metrics, step: int) -> None:
        """Add to a step that was logged before."""
        for name, run in list(self._runs.items()):
            self._send(name, run, metrics, step)

    def _send(self, name: str, run: TrackedRun, metrics: Metrics, step: int, table: Table | None = None) -> None:
        values = {metric: value for metric, value in metrics.items() if math.isfinite(value)}
        with self._left_if_it_fails(name):
            run.log(values, step, table)

    def finish(self, is_done: bool) -> None:
        """Send what is left; of a run that is done, its report too."""
        if is_done and self.show_tables:
            self._send_report()
        with ExitStack() as stack:  # all of them, though one fails
            for name, run in self._runs.copy().items():
                stack.callback(self._finish, name, run, is_done)

    def _send_report(self) -> None:
        with TemporaryDirectory() as place:
            page = Path(place) / "report.html"
            try:
                write_report([read_run(self._folder)], page)
            except Exception as error:  # the trackers have yet to send what they hold
                kind = "" if isinstance(error, EXPECTED_ERRORS) else f"{type(error).__name__}: "
                return self._note(f"the report for the trackers could not be made: {kind}{one_line(error)}")
            for name, run in list(self._runs.items()):
                if run.package is not None:
                    with self._left_if_it_fails(name):
                        run.send_report(page)

    def _finish(self, name: str, run: TrackedRun, is_done: bool) -> None:
        with self._left_if_it_fails(name):
            run.finish(is_done)

    @contextmanager
    def _left_if_it_fails(self, name: str) -> Iterator[None]:
        if name == "tensorboard":
            with writing(self._folder / "tensorboard"):  # its thread passes on what a disk said, without the file
                yield
            return
        try:
            yield
        except Exception as error:
            self._runs.pop(name, None)
            what = f"{type(error).__name__}: {one_line(error)}"
            self._note(f"{name} failed, and is sent nothing more until the run is resumed ({what})")
