"""Sends metrics to Accelerate's trackers (TensorBoard, Weights & Biases, ...)."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import Recipe
from grpo_cli.recipe.unused import RUN_NAMES
from grpo_cli.record.metrics import Metrics
from grpo_cli.train.disk import writing


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a `logging.trackers` that Accelerate does not know or whose package is missing."""
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for index, name in enumerate(names):
        if name not in known:
            raise UserError(f"logging.trackers.{index}: {name!r} is not one of {', '.join(known)}")
        if name not in available:
            raise UserError(
                f"logging.trackers.{index}: the package of {name} is not installed; install it, or remove {name}"
            )


_tell = threading.excepthook


def _tell_unless_raised_again(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, unless it is TensorBoard's: the tracker's next `log` raises it again."""
    if type(failure.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        _tell(failure)


class Trackers:
    """The recipe's `logging.trackers`, checked by `check_trackers` before."""

    def __init__(self, recipe: Recipe, steps_done: int) -> None:
        self._trackers: list[Any] = []
        folder = self._folder = Path(recipe.train.output_dir).expanduser()
        for name in recipe.logging.trackers:
            tracker_class: Any = LOGGER_TYPE_TO_CLASS[name]
            if name == "tensorboard":
                # Steps that a killed run logged after its checkpoint are logged again.
                tracker = tracker_class("tensorboard", logging_dir=folder, purge_step=steps_done + 1)
                threading.excepthook = _tell_unless_raised_again
            elif tracker_class.requires_logging_directory:
                tracker = tracker_class(folder.name, logging_dir=folder)
            elif name in RUN_NAMES:
                project = recipe.logging.project or os.environ.get("WANDB_PROJECT") or "grpo-cli"
                option = RUN_NAMES[name]
                tracker = tracker_class(project, **({option: folder.name} if option else {}))
            else:
                tracker = tracker_class(folder.name)
            tracker.start()
            if name in RUN_NAMES:
                tracker.store_init_configuration(recipe.model_dump(mode="json"))
            self._trackers.append(tracker)

    def log(self, metrics: Metrics, step: int) -> None:
        values = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers:
            with self._naming(tracker):
                tracker.log(values, step=step)

    def finish(self) -> None:
        with ExitStack() as stack:  # all of them, though one fails
            for tracker in self._trackers:
                stack.callback(self._finish, tracker)

    def _finish(self, tracker: Any) -> None:
        with self._naming(tracker):
            tracker.finish()

    def _naming(self, tracker: Any) -> AbstractContextManager[None]:
        """TensorBoard's thread passes on what a disk said, without the file."""
        return writing(self._folder / "tensorboard") if tracker.name == "tensorboard" else nullcontext()
