"""The folder of a run: whether a run may have it, and what an earlier start has left in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_cli.errors import UserError
from grpo_cli.recipe.load import dump_recipe, load_recipe
from grpo_cli.recipe.schema import Recipe
from grpo_cli.train.whole_files import write_text

FREE_ON_RESUME = (
    "train.output_dir",
    "train.max_steps",
    "train.save_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.max_skipped_steps",
    "train.max_tokens_per_microbatch",
    "model.gradient_checkpointing",
    "generation.server",
    "generation.vllm",
    "logging",
    "distributed",
)
"""Settings that may change between a checkpoint and its resume; any other would make another run of it. Those
that decide about memory and processes change results by rounding."""


def folder_of(recipe: Recipe) -> Path:
    """The folder that `train.output_dir` names."""
    return Path(recipe.train.output_dir).expanduser()


def check_run_folder(recipe: Recipe, *, resume: bool) -> None:
    """See, before anything is loaded, that the run may have its folder. Nothing is written.

    A run that left neither a checkpoint nor a final model has nothing to continue, and may be started over.

    Raises:
        UserError: the folder holds a run and `resume` is not set, or its recipe is another one.
    """
    folder = folder_of(recipe)
    recipe_file = folder / "recipe.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"train.output_dir: {folder} is a file")
    checkpoints, is_finished = list_checkpoints(folder), (folder / "final").exists()
    if not checkpoints and not is_finished:
        return
    if not resume:
        raise UserError(
            f"train.output_dir: {folder} already holds a run; continue it with --resume, or choose another "
            "folder with --set train.output_dir=..."
        )
    if not checkpoints:
        raise UserError(f"--resume: the run in {folder} is finished and left no checkpoint to go on from")
    before = load_recipe(recipe_file)  # keys that are newer than it have their defaults
    changed = changed_settings(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"--resume: the run in {folder} was started with other settings: {'; '.join(changed)}. "
            "Change them back, or start a new run in another train.output_dir"
        )


def open_run_folder(recipe: Recipe, note: Callable[[str], None]) -> Path | None:
    """Create or enter the run's folder; return the checkpoint to resume from, if there is one.

    `note` is told of what an earlier start has left and that cannot be removed.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder = folder_of(recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise UserError(f"train.output_dir: cannot write to {folder}: {error.strerror}") from error
    for leftover in folder.glob(".*.partial"):
        _remove_leftover(leftover, note)
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key was X, is Y` for each setting that differs and decides what the run computes."""
    changed: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        dotted = f"{prefix}{key}"
        old, new = before.get(key), after.get(key)
        if dotted in FREE_ON_RESUME or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed.extend(changed_settings(old, new, f"{dotted}."))
        else:
            changed.append(f"{dotted} was {old!r}, is {new!r}")
    return changed


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "position.json").is_file()]
    return sorted(whole, key=lambda path: (len(path.name), path.name))


def _remove_leftover(path: Path, note: Callable[[str], None]) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        note(f"{path} is left from an earlier start and cannot be removed ({error})")
