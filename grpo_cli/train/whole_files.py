"""Files and folders that are whole or absent: written beside their place, synced and renamed. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError

from grpo_cli.errors import RunError
from grpo_cli.train.disk import sentence, writing
from grpo_cli.train.manifest import FileSum, sum_of, write_manifest

if TYPE_CHECKING:
    from grpo_cli.distributed.ranks import Ranks

T = TypeVar("T")


def write_whole(final: Path, write: Callable[[Path], Mapping[str, FileSum]], ranks: Ranks) -> None:
    """Have every rank write to a folder that appears as `final` all at once, if none of them fails.

    Args:
        final: the folder, which a manifest of all its files is part of.
        write: writes to the folder that it is given. What it seals, it returns; rank 0 seals the rest.
        ranks: the processes that write.

    Raises:
        RunError: a disk refused; nothing is left of it.
    """
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()  # in a folder that is there: a run's that was deleted under it does not come back in part

    def end(sums: dict[str, FileSum]) -> None:
        paths = sorted(partial.rglob("*"))
        left = [path for path in paths if path.is_file() and path.relative_to(partial).as_posix() not in sums]
        sums = sums | seal(partial, left)
        manifest = write_manifest(partial, sums)
        for path in [manifest, *paths, partial]:
            sync(path)
        for name, written in sums.items():
            if (partial / name).stat().st_size != written.size:
                raise RunError(f"writing {final} failed: {name} of another process has not arrived whole")
        _rename(partial, final)

    def told(work: Callable[[], T]) -> Callable[[], T]:
        def work_or_say_why() -> T:
            try:
                return work()
            except (OSError, RuntimeError, SafetensorError) as error:
                why = sentence(error, partial)
                raise RunError(f"writing {final} failed, earlier checkpoints are kept: {why}") from error

        return work_or_say_why

    try:
        ranks.led(told(begin))
        sealed = ranks.together(told(lambda: write(partial)))
        sums = {name: written for of_rank in sealed for name, written in of_rank.items()}
        ranks.led(told(lambda: end(sums)))
    except RunError:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _rename(partial: Path, final: Path) -> None:
    """Give a folder its name; what had the name before is removed afterwards, or comes back."""
    before = final.with_name(f".{final.name}.before.partial")
    is_replaced = final.exists()
    if is_replaced:
        os.rename(final, before)
    try:
        os.rename(partial, final)
    except OSError:
        if is_replaced:
            os.rename(before, final)
        raise
    sync(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def seal(folder: Path, paths: Iterable[Path]) -> dict[str, FileSum]:
    """Flush files to the disk and add them up meanwhile; the sums have the files' paths within `folder`."""
    paths = list(paths)

    def sync_all() -> None:
        for path in paths:
            sync(path)

    with ThreadPoolExecutor(1) as background:
        synced = background.submit(sync_all)
        sums = {path.relative_to(folder).as_posix(): sum_of(path) for path in paths}
        synced.result()
    return sums


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
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
