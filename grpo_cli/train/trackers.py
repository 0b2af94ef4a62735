"""Sends metrics to Accelerate's trackers (TensorBoard, Weights & Biases, ...) and completions to parquet."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import Recipe
from grpo_cli.recipe.unused import RUN_NAMES
from grpo_cli.rollout.replay import EARLIER_ROW, ROW_COLUMNS, SAMPLED, as_text, completions_file
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.disk import writing
from grpo_cli.train.metrics import Metrics


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


def remove_completions_after(folder: Path, step: int) -> None:
    """Remove what an earlier start of the run wrote for steps that will be run again."""
    for path in (folder / "completions").glob("step-*.parquet"):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()


def save_completions(
    folder: Path, step: int, rollout: Rollout, names: Sequence[str], rewards: Any, advantages: Any
) -> None:
    """Write one step's completions to `completions/step-00000N.parquet`; chats as JSON text.

    Token ids and their log-probabilities are what `engine: replay` trains on again.

    Args:
        folder: of the run.
        step: counted from 1.
        rollout: N completions.
        names: of the K reward functions.
        rewards: (N, K).
        advantages: (N,).
    """
    batch = rollout.scoring_batch()
    last = [rows[-1] for rows in rollout.rows_by_completion]
    columns: dict[str, Any] = {
        "step": [step] * len(rollout.completions),
        "prompt": [p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in batch.prompts],
        "completion": [as_text(completion) for completion in rollout.completions],
        "tokens": [completion.num_sampled for completion in rollout.completions],
        "finish_reason": [completion.finish_reason for completion in rollout.completions],
        "advantage": advantages.tolist(),
    }
    columns |= {f"reward/{name}": rewards[:, index].tolist() for index, name in enumerate(names)}
    for name, (key, kind) in ROW_COLUMNS.items():
        columns[name] = pa.array([vars(row)[key] for row in last], kind)
    if any(completion.messages is not None for completion in rollout.completions):
        columns["sampled"] = pa.array([row.sampled for row in last], SAMPLED)
        columns["turns"] = [completion.turns for completion in rollout.completions]
        columns["tool_calls"] = [completion.tools.calls for completion in rollout.completions]
        earlier = [[vars(row) for row in completion.earlier] for completion in rollout.completions]
        columns["earlier"] = pa.array(earlier, pa.list_(EARLIER_ROW))
    path = completions_file(folder, step)
    path.parent.mkdir(exist_ok=True)
    with writing(path):
        pq.write_table(pa.table(columns), path, compression="zstd", write_page_checksum=True)
