"""The folder of a run: whether a run may have it, and what an earlier start has left in it. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_cli.errors import RunError, UserError
from grpo_cli.recipe.differences import differences
from grpo_cli.recipe.load import dump_recipe, load_recipe
from grpo_cli.recipe.schema import Recipe
from grpo_cli.train.manifest import MANIFEST, faults, has_manifest
from grpo_cli.train.run_lock import RunLock, wait_until_free
from grpo_cli.train.whole_files import write_text

if TYPE_CHECKING:
    from grpo_cli.distributed.ranks import Ranks

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


def check_run_folder(recipe: Recipe, *, resume: bool, note: Callable[[str], None] = print) -> None:
    """See, before anything is loaded, that the run may have its folder. Nothing is written.

    A run that left neither a checkpoint nor a final model has nothing to continue, and may be started over.
    `note` is told if another run has to be waited for.

    Raises:
        UserError: the folder is in use, or holds a run and `resume` is not set, or its recipe is another one.
    """
    folder = folder_of(recipe)
    recipe_file = folder / "recipe.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"train.output_dir: {folder} is a file")
    wait_until_free(folder, resume=resume, note=note)
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
    changed = changed_settings(before, recipe)
    if changed:
        raise UserError(
            f"--resume: the run in {folder} was started with other settings: {'; '.join(changed)}. "
            f"Change them back to what {recipe_file} says, or start a new run in another train.output_dir"
        )


def hold_run_folder(recipe: Recipe, note: Callable[[str], None]) -> RunLock:
    """Create the run's folder if it is not there, and keep other runs out of it.

    Raises:
        UserError: the folder cannot be written to, or another run holds it.
    """
    folder = folder_of(recipe)
    with _as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return RunLock(folder, note)


def open_run_folder(recipe: Recipe, note: Callable[[str], None]) -> None:
    """Write the recipe into the run's folder, and remove what an earlier start has left half done.

    `note` is told of what cannot be removed.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder = folder_of(recipe)
    with _as_user_error(folder):
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
    for replaced in folder.glob(".*.before.partial"):
        name = folder / replaced.name.removeprefix(".").removesuffix(".before.partial")
        if not name.exists():  # killed before the new one had the name
            replaced.rename(name)
    for leftover in folder.glob(".*.partial"):
        _remove_leftover(leftover, note)


@contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"train.output_dir: cannot write to {folder}: {error.strerror}") from error


def whole_checkpoint(folder: Path, ranks: Ranks, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as its manifest says, if there is a checkpoint. Each rank reads a share of it.

    Broken ones after it are set aside under another name, so that no later start takes them.

    Raises:
        RunError: none of the checkpoints is whole; they are left as they are.
    """
    broken: dict[Path, str] = {}
    for path in reversed(ranks.led(lambda: list_checkpoints(folder))):
        of_ranks = ranks.together(partial(faults, path, ranks.rank, ranks.world_size))
        found = [fault for of_rank in of_ranks for fault in of_rank]
        if found:
            broken[path] = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
            continue
        if ranks.is_main:
            if not has_manifest(path):
                note(f"{path} has no {MANIFEST}, as those of older versions: it is read as it is, unverified")
            for other, why in broken.items():
                note(f"{other} is broken ({why}); going on from {path.name}, and {_set_aside(other)}")
        return path
    if broken:
        damaged = "; ".join(f"{path} is damaged: {why}" for path, why in broken.items())
        raise RunError(
            f"--resume: {damaged}. No checkpoint is left to go on from: put these files back from a copy, or "
            "start anew in another train.output_dir"
        )
    return None


def _set_aside(path: Path) -> str:
    names = (path.with_name(f"broken-{path.name}{suffix}") for suffix in ("", *map("-{}".format, range(2, 1000))))
    aside = next(name for name in names if not name.exists())
    try:
        path.rename(aside)
    except OSError as error:
        return f"it cannot be renamed ({error.strerror}), and will be replaced at its step"
    return f"it is kept as {aside.name}"


def changed_settings(before: Recipe, after: Recipe) -> list[str]:
    """`key was X, is Y` for each setting that differs and decides what the run computes."""
    return [
        "{} was {}, is {}".format(found.key, *found.texts)
        for found in differences(before.model_dump(mode="json"), after.model_dump(mode="json"))
        if not any(f"{found.key}.".startswith(f"{free}.") for free in FREE_ON_RESUME)
    ]


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, be they whole or damaged since they were written."""
    signs = ("position.json", MANIFEST)
    found = [path for path in folder.glob("checkpoint-*") if any((path / sign).is_file() for sign in signs)]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _remove_leftover(path: Path, note: Callable[[str], None]) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        note(f"{path} is left from an earlier start and cannot be removed ({error})")
