"""Checkpoints, and the way back from them.

A checkpoint lies between two steps, and all that happens in a step follows from the recipe, the step's number and
the weights, so a run killed anywhere continues from its last checkpoint to the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_cli.distributed.strategies.base import OptimizerState, joined_state
from grpo_cli.errors import RunError, one_line
from grpo_cli.policy.export import (
    gathered_standalone,
    gathered_weights,
    save_standalone,
    save_weights,
    saved_weights,
)
from grpo_cli.record.metrics import METRICS
from grpo_cli.train.disk import writing
from grpo_cli.train.learner import Learner
from grpo_cli.train.manifest import FileSum
from grpo_cli.train.metrics import write_record
from grpo_cli.train.optim import restore_schedule
from grpo_cli.train.run_folder import list_checkpoints
from grpo_cli.train.whole_files import seal, write_whole


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
    folder: Path, learner: Learner, position: Position, keep: int, note: Callable[[str], None]
) -> Path:
    """Write `checkpoint-00000N`, each rank its part, and remove all but the newest `keep`.

    Args:
        folder: of the run.
        learner: whose policy, optimizer and schedule are saved.
        position: between two steps.
        keep: checkpoints that stay, this one included.
        note: told of an old checkpoint that cannot be removed.

    Raises:
        RunError: the disk refused; earlier checkpoints are as they were.
    """
    ranks = learner.ranks
    # What needs all ranks comes first: a rank whose disk is full must not leave the others waiting.
    strategy, is_sharded = learner.strategy, learner.strategy.shards_weights
    weights = gathered_weights(learner.model, strategy, ranks.is_main) if is_sharded else None
    state = strategy.optimizer_state()

    def write(partial: Path) -> Mapping[str, FileSum]:
        part = partial / optimizer_file(ranks.rank, ranks.world_size)
        with writing(part):
            torch.save(state, part)
        if ranks.is_main:
            with writing(partial / "*.safetensors"):
                save_weights(learner.model, partial, weights)
            learner.tokenizer.save_pretrained(partial)
            with writing(partial / "scheduler.pt"):
                torch.save(learner.scheduler.state_dict(), partial / "scheduler.pt")
            (partial / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
            write_record(partial, folder / METRICS)
        # By who has written it: rank 0 could not flush it to a shared disk, and would have to fetch it first.
        return seal(partial, [part])

    final = checkpoint_path(folder, position)
    write_whole(final, write, ranks)
    ranks.led(lambda: _remove_old(folder, keep, note))
    return final


def checkpoint_path(folder: Path, position: Position) -> Path:
    """Where the checkpoint of a position lies."""
    return folder / f"checkpoint-{position.step:06d}"


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


def optimizer_file(rank: int, world_size: int) -> str:
    """Name of one rank's part of the optimizer's state."""
    return "optimizer.pt" if world_size == 1 else f"optimizer-{rank:05d}-of-{world_size:05d}.pt"


def save_final(folder: Path, learner: Learner) -> Path:
    """Write `final/`: a model that plain transformers and vLLM load as it is.

    Raises:
        RunError: the disk refused; checkpoints are as they were.
    """
    strategy, is_main = learner.strategy, learner.ranks.is_main
    weights = gathered_standalone(learner.model, strategy, is_main) if strategy.shards_weights else None

    def write(partial: Path) -> Mapping[str, FileSum]:
        if learner.ranks.is_main:
            with writing(partial / "*.safetensors"):
                save_standalone(learner.model, learner.tokenizer, partial, weights)
        return {}

    write_whole(folder / "final", write, learner.ranks)
    return folder / "final"


@dataclass(frozen=True)
class Saved:
    """A checkpoint's contents; its weights only where they are read."""

    weights: dict[str, torch.Tensor] | None
    optimizer: OptimizerState
    scheduler: dict[str, Any]
    position: Position


def load_checkpoint(path: Path, learner: Learner) -> Position:
    """Restore everything that `save_checkpoint` wrote, bit for bit where as many ranks wrote it.

    Raises:
        RunError: a file of it is missing or damaged.
    """
    read: list[Saved] = []
    with _explained(path):
        # All have read before any of them goes on to what needs all of them.
        learner.ranks.together(
            lambda: _read_explained(path, learner.model if learner.ranks.is_main else None, read)
        )
        saved = read[0]
        learner.strategy.restore(saved.weights, saved.optimizer)
        restore_schedule(learner.scheduler, saved.scheduler)
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
            f"({type(error).__name__}: {one_line(error, 300)}); "
            "remove it to go on from the checkpoint before it, if there is one"
        ) from error


def read_position(path: Path) -> Position:
    return Position(**json.loads((path / "position.json").read_text(encoding="utf-8")))
