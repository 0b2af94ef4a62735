"""The manifest of a folder: the size and checksum of each of its files, written after all of them.

It guards against damage, not against forgery. No torch import.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileSum:
    """What a file held when it was written."""

    size: int
    """In bytes."""
    xxh3_128: str
    """As `xxh128sum` prints it."""


def sum_of(path: Path) -> FileSum:
    """Read a file once.

    It is read, not mapped into memory, where a disk that fails would end the process with SIGBUS.
    """
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)
        return FileSum(file.tell(), digest.hexdigest())


def write_manifest(folder: Path, sums: Mapping[str, FileSum]) -> Path:
    """Write the manifest of files, given by their paths within the folder; the caller syncs it."""
    files = {name: asdict(sums[name]) for name in sorted(sums)}
    path = folder / MANIFEST
    path.write_text(json.dumps({"xxh3_128": _own_sum(files), "files": files}, indent=1) + "\n", encoding="utf-8")
    return path


def has_manifest(folder: Path) -> bool:
    """Whether the folder can be verified; those that older versions wrote cannot."""
    return (folder / MANIFEST).exists()


def faults(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """What is broken in a folder, a text for each file; nothing if it is whole, or has no manifest.

    Args:
        folder: with a manifest, or without.
        rank: each of several processes reads its share of the files, and finds what is broken in it.
        world_size: number of these processes.
    """
    if not has_manifest(folder):
        return []
    try:
        sums = _read_manifest(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} itself is damaged"] if rank == 0 else []
    found = [_fault(folder / name, sums[name]) for name in list(sums)[rank::world_size]]
    return [fault for fault in found if fault]


def _fault(path: Path, written: FileSum) -> str | None:
    try:
        size = path.stat().st_size
        if size != written.size:
            return f"{path.name} has {size} bytes, {written.size} were written"
        if sum_of(path) != written:
            return f"{path.name} has other bytes than were written: its checksum differs"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def _read_manifest(folder: Path) -> dict[str, FileSum]:
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if content["xxh3_128"] != _own_sum(content["files"]):
        raise ValueError("the manifest has other bytes than were written")
    return {name: FileSum(**entry) for name, entry in content["files"].items()}


def _own_sum(files: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())
