"""Checkpoints that are whole or absent, and the way back from them.

A checkpoint is written beside its final place, synced and renamed. It lies between two steps, and all that
happens in a step follows from the recipe, the step's number and the weights, so a run killed anywhere continues
from its last checkpoint to the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from grpo_cli.errors import RunError, UserError
from grpo_cli.policy.model import restore_weights, save_standalone, save_weights
from grpo_cli.recipe.load import dump_recipe, read_yaml
from grpo_cli.recipe.schema import Recipe

FREE_ON_RESUME = (
    "train.output_dir",
    "train.max_steps",
    "train.save_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.max_tokens_per_microbatch",
    "model.gradient_checkpointing",
    "generation.server",
    "generation.vllm",
    "logging",
)
"""Settings that may change between a checkpoint and its resume; any other would make another run of it. The two
that decide about memory change results by rounding."""


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps."""

    step: int = 0
    """Steps done."""
    num_tokens: int = 0
    """Prompt and completion tokens seen."""

    def advance(self, num_tokens: int) -> Position:
        """The position one step further."""
        return Position(self.step + 1, self.num_tokens + num_tokens)


def save_checkpoint(
    folder: Path, position: Position, model: Any, tokenizer: Any, optimizer: Any, scheduler: Any, keep: int
) -> Path:
    """Write `checkpoint-00000N` and remove all but the newest `keep`.

    Raises:
        RunError: the disk refused; earlier checkpoints are as they were.
    """
    final = folder / f"checkpoint-{position.step:06d}"
    with written_whole(final) as partial:
        save_weights(model, partial)
        tokenizer.save_pretrained(partial)
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        torch.save(scheduler.state_dict(), partial / "scheduler.pt")
        (partial / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        # Out of the list first: a checkpoint that is half removed is none.
        removed = old.rename(old.with_name(f".{old.name}.partial"))
        shutil.rmtree(removed)
    return final


def save_final(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write `final/`: a model that plain transformers and vLLM load as it is.

    Raises:
        RunError: the disk refused; checkpoints are as they were.
    """
    with written_whole(folder / "final") as partial:
        save_standalone(model, tokenizer, partial)
    return folder / "final"


@contextmanager
def written_whole(final: Path) -> Iterator[Path]:
    """Give a folder to write to, which appears as `final` all at once when the block ends without an error.

    Raises:
        RunError: the disk refused; nothing is left of it.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        sync(final.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a full disk as a RuntimeError.
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"writing {final} failed, earlier checkpoints are kept: {error}") from error


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "position.json").is_file()]
    return sorted(whole, key=lambda path: (len(path.name), path.name))


def load_checkpoint(path: Path, model: Any, optimizer: Any, scheduler: Any) -> Position:
    """Restore everything that `save_checkpoint` wrote, bit for bit.

    Raises:
        RunError: a file of it is missing or damaged.
    """
    try:
        restore_weights(model, path)
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
        scheduler.load_state_dict(torch.load(path / "scheduler.pt", map_location="cpu", weights_only=True))
        return read_position(path)
    except Exception as error:  # torch, pickle, zipfile, safetensors and json each raise their own
        raise RunError(
            f"--resume: {path} is damaged, or of another model or optimizer "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "remove it to go on from the checkpoint before it, if there is one"
        ) from error


def read_position(path: Path) -> Position:
    return Position(**json.loads((path / "position.json").read_text(encoding="utf-8")))


def check_run_folder(recipe: Recipe, *, resume: bool) -> None:
    """See, before anything is loaded, that the run may have its folder. Nothing is written.

    A run that left neither a checkpoint nor a final model has nothing to continue, and may be started over.

    Raises:
        UserError: the folder holds a run and `resume` is not set, or its recipe is another one.
    """
    folder = Path(recipe.train.output_dir).expanduser()
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
    changed = changed_settings(read_yaml(recipe_file).values, recipe.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"--resume: the run in {folder} was started with other settings: {'; '.join(changed)}. "
            "Change them back, or start a new run in another train.output_dir"
        )


def open_run_folder(recipe: Recipe) -> Path | None:
    """Create or enter the run's folder; return the checkpoint to resume from, if there is one.

    Raises:
        UserError: the folder cannot be written to.
    """
    folder = Path(recipe.train.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise UserError(f"train.output_dir: cannot write to {folder}: {error.strerror}") from error
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def write_text(path: Path, text: str) -> None:
    """Replace a small file all at once."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


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
