"""A resumed run goes on from the newest checkpoint that is whole, and ends as if nothing had happened."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import grpo_cli
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError
from grpo_cli.train.manifest import MANIFEST, faults
from grpo_cli.train.run_folder import open_run_folder, whole_checkpoint
from tests.train.test_checkpoint import Parts, contents, names, recipe_of
from tests.train.test_loop import numbers
from tests.train.test_manifest import flip_bit


def three_checkpoints(folder: Path) -> list[Path]:
    parts = Parts(steps=1)
    return [parts.save(folder, step, keep=3) for step in (1, 2, 3)]


def chosen(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is said about it."""
    notes: list[str] = []
    return whole_checkpoint(folder, Ranks(), notes.append), notes


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "position.json", "config.json"]
)
@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "missing"])
def test_the_one_before_a_broken_checkpoint_is_used(tmp_path: Path, name: str, damage: str) -> None:
    _, second, third = three_checkpoints(tmp_path)
    file = third / name
    if damage == "flipped bit":
        flip_bit(file, file.stat().st_size // 2)
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    broken = contents(third)
    found, (note,) = chosen(tmp_path)
    assert found == second
    assert note.startswith(f"{third} is broken ({name} ")
    assert note.endswith("going on from checkpoint-000002, and it is kept as broken-checkpoint-000003")
    assert contents(tmp_path / "broken-checkpoint-000003") == broken, "no data of a user is removed"
    assert chosen(tmp_path) == (second, []), "a later start does not come upon it again"


def test_a_checkpoint_that_breaks_twice_is_kept_twice(tmp_path: Path) -> None:
    for _ in range(2):
        third = three_checkpoints(tmp_path)[-1]
        flip_bit(third / "optimizer.pt")
        chosen(tmp_path)
    assert {"broken-checkpoint-000003", "broken-checkpoint-000003-2"} < set(names(tmp_path))


def test_what_cannot_be_renamed_is_said_to_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, second, third = three_checkpoints(tmp_path)
    flip_bit(third / "optimizer.pt")

    def refused(path: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(Path, "rename", refused)
    found, (note,) = chosen(tmp_path)
    assert found == second
    assert "cannot be renamed (Device or resource busy), and will be replaced at its step" in note


def test_a_run_without_a_whole_checkpoint_names_every_broken_file_and_touches_none(tmp_path: Path) -> None:
    first, second, third = three_checkpoints(tmp_path)
    flip_bit(first / "model.safetensors")
    (second / "optimizer.pt").write_bytes(b"")
    (third / "scheduler.pt").unlink()
    before = contents(tmp_path)
    with pytest.raises(RunError) as caught:
        chosen(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"--resume: {third} is damaged: scheduler.pt is missing; ")
    assert f"{second} is damaged: optimizer.pt has 0 bytes" in message
    assert f"{first} is damaged: model.safetensors has other bytes" in message
    assert "put these files back from a copy, or start anew in another train.output_dir" in message
    assert contents(tmp_path) == before


def test_a_checkpoint_of_an_older_version_is_read_with_a_note(tmp_path: Path) -> None:
    third = three_checkpoints(tmp_path)[-1]
    (third / MANIFEST).unlink()
    found, (note,) = chosen(tmp_path)
    assert found == third
    assert "has no manifest.json, as those of older versions: it is read as it is, unverified" in note


def test_a_folder_that_was_being_replaced_gets_its_name_back(tiny_recipe: dict[str, Any]) -> None:
    recipe = recipe_of(tiny_recipe)
    folder = Path(recipe.train.output_dir)
    (folder / ".final.before.partial").mkdir(parents=True)
    (folder / ".final.before.partial" / "config.json").write_text("{}")
    (folder / ".final.partial").mkdir()
    open_run_folder(recipe, pytest.fail)
    assert names(folder) == ["final", "recipe.yaml"]
    assert contents(folder / "final") == {"config.json": b"{}"}


def test_a_run_with_a_broken_checkpoint_ends_with_the_same_bytes(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    tiny_recipe["train"] |= {"max_steps": 4, "save_every": 1, "output_dir": str(tmp_path / "whole")}
    whole = grpo_cli.train(tiny_recipe, console=Console(file=io.StringIO())).output_dir
    shutil.copytree(whole, tmp_path / "damaged")
    flip_bit(tmp_path / "damaged" / "checkpoint-000004" / "model.safetensors", 9000)
    tiny_recipe["train"]["output_dir"] = str(tmp_path / "damaged")
    screen = io.StringIO()
    damaged = grpo_cli.train(tiny_recipe, resume=True, console=Console(file=screen, width=1000)).output_dir
    assert "checkpoint-000004 is broken (model.safetensors has other bytes" in screen.getvalue()
    assert "step 4/4" in screen.getvalue()
    assert "step 3/4" not in screen.getvalue()
    for name in ("checkpoint-000004", "final"):
        assert contents(damaged / name) == contents(whole / name)
        assert faults(damaged / name) == []
    assert numbers(damaged / "metrics.jsonl") == numbers(whole / "metrics.jsonl")
    assert names(damaged / "completions") == names(whole / "completions")
