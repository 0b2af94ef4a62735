"""Checkpoints that are whole or absent, and the way back from them.

A checkpoint is written beside its final place, synced and renamed. It lies between two steps, and all that
happens in a step follows from the recipe, the step's number and the weights, so a run killed anywhere continues
from its last checkpoint to the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies.base import OptimizerState, joined_state
from grpo_cli.errors import RunError, UserError
from grpo_cli.policy.export import (
    gathered_standalone,
    gathered_weights,
    save_standalone,
    save_weights,
    saved_weights,
)
from grpo_cli.recipe.load import dump_recipe, load_recipe
from grpo_cli.recipe.schema import Recipe
from grpo_cli.train.optim import restore_schedule
from grpo_cli.train.run import Run

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
    "distributed",
)
"""Settings that may change between a checkpoint and its resume; any other would make another run of it. Those
that decide about memory and processes change results by rounding."""


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


def save_checkpoint(run: Run, position: Position, scheduler: Any, note: Callable[[str], None]) -> Path:
    """Write `checkpoint-00000N`, each rank its part, and remove all but the newest `train.keep_checkpoints`.

    Args:
        run: the parts of the run.
        position: between two steps.
        scheduler: of the learning rate.
        note: told of an old checkpoint that cannot be removed.

    Raises:
        RunError: the disk refused; earlier checkpoints are as they were.
    """
    ranks = run.ranks
    # What needs all ranks comes first: a rank whose disk is full must not leave the others waiting.
    is_sharded = run.strategy.shards_weights
    weights = gathered_weights(run.model, run.strategy, ranks.is_main) if is_sharded else None
    state = run.strategy.optimizer_state()

    def write(partial: Path) -> None:
        part = partial / optimizer_file(ranks.rank, ranks.world_size)
        torch.save(state, part)
        sync(part)  # by who has written it: on a shared file system rank 0 cannot
        if ranks.is_main:
            save_weights(run.model, partial, weights)
            run.tokenizer.save_pretrained(partial)
            torch.save(scheduler.state_dict(), partial / "scheduler.pt")
            (partial / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")

    final = checkpoint_path(run, position)
    write_whole(final, write, ranks)
    ranks.led(lambda: _remove_old(run.folder, run.recipe.train.keep_checkpoints, note))
    return final


def checkpoint_path(run: Run, position: Position) -> Path:
    """Where the checkpoint of a position lies."""
    return run.folder / f"checkpoint-{position.step:06d}"


def _remove_old(folder: Path, keep: int, note: Callable[[str], None]) -> None:
    for left in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        # Out of the list first: a checkpoint that is half removed is none.
        removed = old.with_name(f".{old.name}.partial")
        try:
            shutil.rmtree(old.rename(removed))
        except OSError as error:  # as NFS, while another process has a file of it open
            note(f"{old} is not kept, but cannot be removed yet ({error}); look for it and {removed.name}")


def _remove_leftover(path: Path, note: Callable[[str], None]) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        note(f"{path} is left from an earlier start and cannot be removed ({error})")


def optimizer_file(rank: int, world_size: int) -> str:
    """Name of one rank's part of the optimizer's state."""
    return "optimizer.pt" if world_size == 1 else f"optimizer-{rank:05d}-of-{world_size:05d}.pt"


def save_final(run: Run) -> Path:
    """Write `final/`: a model that plain transformers and vLLM load as it is.

    Raises:
        RunError: the disk refused; checkpoints are as they were.
    """
    is_sharded, is_main = run.strategy.shards_weights, run.ranks.is_main
    weights = gathered_standalone(run.model, run.strategy, is_main) if is_sharded else None

    def write(partial: Path) -> None:
        if run.ranks.is_main:
            save_standalone(run.model, run.tokenizer, partial, weights)

    write_whole(run.folder / "final", write, run.ranks)
    return run.folder / "final"


def write_whole(final: Path, write: Callable[[Path], None], ranks: Ranks) -> None:
    """Have every rank write to a folder that appears as `final` all at once, if none of them fails.

    Raises:
        RunError: a disk refused; nothing is left of it.
    """
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def end() -> None:
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        before = final.with_name(f".{final.name}.before.partial")
        if final.exists():
            os.rename(final, before)
        os.rename(partial, final)
        sync(final.parent)
        shutil.rmtree(before, ignore_errors=True)

    def told(work: Callable[[], None]) -> Callable[[], None]:
        def work_or_say_why() -> None:
            try:
                work()
            except (
                OSError,
                RuntimeError,
                SafetensorError,
            ) as error:  # torch reports a full disk as a RuntimeError
                raise RunError(f"writing {final} failed, earlier checkpoints are kept: {error}") from error

        return work_or_say_why

    try:
        ranks.led(told(begin))
        ranks.together(told(lambda: write(partial)))
        ranks.led(told(end))
    except RunError:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


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


@dataclass(frozen=True)
class Saved:
    """A checkpoint's contents; its weights only where they are read."""

    weights: dict[str, torch.Tensor] | None
    optimizer: OptimizerState
    scheduler: dict[str, Any]
    position: Position


def load_checkpoint(path: Path, run: Run, scheduler: Any) -> Position:
    """Restore everything that `save_checkpoint` wrote, bit for bit where as many ranks wrote it.

    Raises:
        RunError: a file of it is missing or damaged.
    """
    read: list[Saved] = []
    with _explained(path):
        # All have read before any of them goes on to what needs all of them.
        run.ranks.together(lambda: _read_explained(path, run.model if run.ranks.is_main else None, read))
        saved = read[0]
        run.strategy.restore(saved.weights, saved.optimizer)
        restore_schedule(scheduler, saved.scheduler)
        return saved.position


def _read_explained(path: Path, model: Any, read: list[Saved]) -> None:
    with _explained(path):
        weights = None if model is None else saved_weights(model, path)
        files = sorted(path.glob("optimizer*.pt"))
        if not files or len(files) != int(files[0].stem.partition("-of-")[2] or 1):
            raise FileNotFoundError(f"{len(files)} of the files optimizer*.pt are there")
        # From the disk when they are needed: no process has room for all of a large model's.
        parts = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
        schedule = torch.load(path / "scheduler.pt", map_location="cpu", weights_only=True)
        read.append(Saved(weights, joined_state(parts), schedule, read_position(path)))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into a RunError that says what to do."""
    try:
        yield
    except RunError:
        raise
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
    folder = Path(recipe.train.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise UserError(f"train.output_dir: cannot write to {folder}: {error.strerror}") from error
    for leftover in folder.glob(".*.partial"):
        _remove_leftover(leftover, note)
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
