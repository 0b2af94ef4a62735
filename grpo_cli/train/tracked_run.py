"""A run as one tracker has it: begun, found again after a resume, shown with its recipe, completions and report.

Accelerate's tracker classes do what they can; the rest is asked of the packages themselves.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from grpo_cli.recipe.load import dump_recipe
from grpo_cli.recipe.schema import Recipe
from grpo_cli.recipe.unused import RUN_NAMES
from grpo_cli.record.completions import EXTRA_COLUMN, REWARD_COLUMN, StoredCompletion
from grpo_cli.train.whole_files import write_text

IDS = "trackers.json"
"""In the run's folder: by tracker, the project and id under which it has the run; of one that failed, too, the
last step that it took."""

WANDB_UPLOAD_S = 60.0
"""How long the end of a run waits for wandb to have sent everything: without a network it would wait for days."""

Table = tuple[list[str], list[list[Any]]]
"""Columns and rows."""


@dataclass
class TrackedRun:
    tracker: Any
    """Accelerate's."""
    package: Any = None
    """wandb or trackio, which have tables and artifacts."""
    has_until: int = 0
    """The tracker has the steps up to this one, from before a resume."""
    where: str = ""
    """For the user: where it can be seen."""

    @property
    def name(self) -> str:
        return self.tracker.name

    def log(self, values: Mapping[str, float], step: int, table: Table | None = None) -> None:
        """Send a step's numbers and, where there can be tables, its completions."""
        sent: dict[str, Any] = dict(values)
        if self.name == "trackio":
            sent.pop("step", None)  # it is trackio's own
        if table is not None and self.package is not None:
            columns, rows = table
            sent["completions"] = self.package.Table(columns=columns, data=rows, allow_mixed_types=True)
        self.tracker.log(sent, step=step)

    def send_report(self, page: Path) -> None:
        artifact = self.package.Artifact(f"report-{self.tracker.tracker.id}", type="report")
        artifact.add_file(str(page))
        self.tracker.tracker.log_artifact(artifact)

    def finish(self, is_done: bool) -> None:
        """Wait until everything is sent. wandb shows a run that is not done as failed, until it is resumed."""
        if self.name == "trackio":
            return _quietly(self.package.finish)  # Accelerate's leaves the run to be finished again at the exit
        if self.name != "wandb":
            return self.tracker.finish()
        run = self.tracker.tracker
        try:
            run.finish(exit_code=0 if is_done else 1)
        except TimeoutError as error:
            rest = f"`wandb sync {Path(run.dir).parent}` sends the rest"
            raise TimeoutError(f"not everything was sent in {WANDB_UPLOAD_S:.0f} s; {rest}") from error


def begin(name: str, recipe: Recipe, folder: Path, steps_done: int, steps_logged: int) -> TrackedRun:
    """Begin a run in a tracker; one that has steps already goes on where the tracker had it.

    Args:
        name: of the tracker.
        recipe: of the run.
        folder: of the run.
        steps_done: that will not be run again.
        steps_logged: that an earlier start of the run has sent.
    """
    PartialState()  # without which Accelerate's classes refuse to say a word
    if name not in ("wandb", "trackio"):
        return TrackedRun(_begin_plain(name, recipe, folder, steps_done))
    project = _project(recipe)
    before = _ids(folder).get(name, {}) if steps_done else {}
    known = before.get("id") if before.get("project") == project else None
    run = (_begin_wandb if name == "wandb" else _begin_trackio)(project, recipe, folder, known)
    tracked_id = run.tracker.tracker.id
    write_text(folder / IDS, json.dumps(_ids(folder) | {name: {"project": project, "id": tracked_id}}, indent=1))
    run.has_until = min(steps_logged, before.get("until", steps_logged)) if tracked_id == known else 0
    return run


def remember_failure(folder: Path, name: str, step: int) -> None:
    """Note that a tracker took no step after this one: those that a resume runs again are sent then."""
    ids = _ids(folder)
    if name in ids:
        ids[name] |= {"until": step}
        write_text(folder / IDS, json.dumps(ids, indent=1))


def _begin_plain(name: str, recipe: Recipe, folder: Path, steps_done: int) -> Any:
    """With what Accelerate's class takes: TensorBoard, MLflow, ..."""
    tracker_class: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # Steps that a killed run logged after its checkpoint are logged again.
        tracker = tracker_class("tensorboard", logging_dir=folder, purge_step=steps_done + 1)
    elif tracker_class.requires_logging_directory:
        tracker = tracker_class(_run_name(folder), logging_dir=folder)
    elif name in RUN_NAMES:
        option = RUN_NAMES[name]
        tracker = tracker_class(_project(recipe), **({option: _run_name(folder)} if option else {}))
    else:
        tracker = tracker_class(_run_name(folder))
    tracker.start()
    if name == "tensorboard":
        tracker.tracker.add_text("recipe", f"```yaml\n{dump_recipe(recipe)}\n```", steps_done)
    elif name in RUN_NAMES:
        tracker.store_init_configuration(recipe.model_dump(mode="json"))
    return tracker


def _begin_wandb(project: str, recipe: Recipe, folder: Path, known: str | None) -> TrackedRun:
    wandb = import_module("wandb")
    tracker = LOGGER_TYPE_TO_CLASS["wandb"](
        project,
        name=_run_name(folder),
        id=known,
        resume="allow",
        dir=os.environ.get("WANDB_DIR") or str(folder),
        settings=wandb.Settings(silent=True, finish_timeout=WANDB_UPLOAD_S, finish_timeout_raises=True),
    )
    tracker.start()
    tracker.store_init_configuration(recipe.model_dump(mode="json"))
    run = tracker.tracker
    if run.disabled:
        where = "nothing is kept, as WANDB_MODE=disabled asks"
    elif run.offline:
        where = f"kept on this machine; `wandb sync {Path(run.dir).parent}` sends it"
    else:
        where = run.url
    return TrackedRun(tracker, wandb, where=f"wandb: {where}")


def _begin_trackio(project: str, recipe: Recipe, folder: Path, known: str | None) -> TrackedRun:
    """trackio finds a run by its name, which another folder's may have, too: then the run is begun anew."""
    trackio = import_module("trackio")
    config, name = recipe.model_dump(mode="json"), _run_name(folder)

    def start(resume: str) -> Any:
        tracker = LOGGER_TYPE_TO_CLASS["trackio"](project, name=name, resume=resume, config=config)
        _quietly(tracker.start)
        return tracker

    tracker = start("allow" if known else "never")
    if known not in (None, tracker.tracker.id):
        tracker = start("never")
    return TrackedRun(tracker, trackio, where=f"trackio: `trackio show --project {project}` shows {name}")


def _quietly(work: Callable[[], None]) -> None:
    """trackio prints what it does, into the line that shows the run's progress."""
    with redirect_stdout(io.StringIO()):
        work()


def _ids(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / IDS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _project(recipe: Recipe) -> str:
    return recipe.logging.project or os.environ.get("WANDB_PROJECT") or "grpo-cli"


def _run_name(folder: Path) -> str:
    return folder.resolve().name


def completions_table(completions: Sequence[StoredCompletion]) -> Table:
    """A step's completions with TRL's columns: one for each reward function, and for each that it logs beside."""
    rewards = list(dict.fromkeys(name for one in completions for name in one.rewards))
    extras = list(dict.fromkeys(name for one in completions for name in one.extras))
    columns = ["step", "prompt", "completion"]
    columns += [REWARD_COLUMN.format(name=name) for name in rewards]
    columns += ["advantage", *(EXTRA_COLUMN.format(name=name) for name in extras)]
    rows = [
        [one.step, _as_text(one.prompt), _as_text(one.completion)]
        + [one.rewards.get(name) for name in rewards]
        + [one.advantage, *(one.extras.get(name) for name in extras)]
        for one in completions
    ]
    return columns, rows


def _as_text(said: str | list[dict[str, Any]]) -> str:
    """A text, or a conversation with a line that names its speaker before each message."""
    if isinstance(said, str):
        return said
    return "\n".join(f"{one.get('name') or one['role']}: {_message(one)}" for one in said)


def _message(message: Mapping[str, Any]) -> str:
    content, calls = message.get("content"), message.get("tool_calls")
    parts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)] if content else []
    return " ".join([*parts, *([json.dumps(calls, ensure_ascii=False)] if calls else [])])
