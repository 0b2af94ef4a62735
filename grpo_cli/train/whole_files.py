"""Files and folders that are whole or absent: written beside their place, synced and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError


def write_whole(final: Path, write: Callable[[Path], None], ranks: Ranks) -> None:
    """Have every rank write to a folder that appears as `final` all at once, if none of them fails.

    Raises:
        RunError: a disk refused; nothing is left of it.
    """
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()  # in a folder that is there: a run's that was deleted under it does not come back in part

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


def write_text(path: Path, text: str) -> None:
    """Replace a small file all at once."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
