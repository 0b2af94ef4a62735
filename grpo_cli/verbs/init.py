"""`grpo init`: files that work together, to start from: a recipe and what it names."""

from __future__ import annotations

import shutil
from pathlib import Path

from grpo_cli.errors import UserError

STARTS = ("keyword", "gsm8k", "tools", "code", "game")
"""Folders of `grpo_cli/starts`. The first is what `grpo init` writes unless it is told otherwise."""


def init(folder: Path, start: str = STARTS[0]) -> list[Path]:
    """Copy a starting point into `folder` and return the paths of its files, the recipe's first.

    Raises:
        UserError: there is no such starting point, one of its files exists already and nothing was written, or the
            folder cannot be written to.
    """
    if start not in STARTS:
        raise UserError(f"--from {start}: there is no such start; choose one of {', '.join(STARTS)}")
    files = start_files(start)
    targets = [folder / file.name for file in files]
    taken = [target for target in targets if target.exists()]
    if taken:
        raise UserError(f"{taken[0]} exists already; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, target in zip(files, targets, strict=True):
            shutil.copyfile(file, target)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    return targets


def start_files(start: str) -> list[Path]:
    """The files of a starting point where they are installed, the recipe first."""
    source = Path(__file__).parents[1] / "starts" / start
    files = [path for path in source.iterdir() if path.is_file()]
    return sorted(files, key=lambda path: (path.name != "recipe.yaml", path.name))
