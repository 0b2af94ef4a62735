"""A folder is whole if every file is as the manifest, written last, says."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError
from grpo_cli.train import manifest, whole_files
from grpo_cli.train.manifest import MANIFEST, FileSum, faults, has_manifest, sum_of
from grpo_cli.train.whole_files import seal, write_whole
from tests.processes import run_processes

FILES = {"model.safetensors": b"weights" * 1000, "config.json": b"{}", "inner/empty": b""}


def write_files(folder: Path) -> dict[str, FileSum]:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_whole(tmp_path / "checkpoint-000001", write_files, Ranks())
    return tmp_path / "checkpoint-000001"


def flip_bit(path: Path, place: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_the_manifest_names_every_file_with_its_size_and_checksum(folder: Path) -> None:
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert listed == {
        name: {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        for name, content in FILES.items()
    }
    assert faults(folder) == []


def test_any_flipped_bit_is_found(folder: Path) -> None:
    for name, content in FILES.items():
        for place in range(0, len(content), 997):
            flip_bit(folder / name, place)
            (fault,) = faults(folder)
            assert fault.startswith(f"{Path(name).name} has other bytes than were written")
            flip_bit(folder / name, place)
    assert faults(folder) == []


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 6999 bytes, 7000 were written"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, 7000 were written"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "bytes, 7000 were written"),
    ],
    ids=["cut short", "empty", "missing", "a folder"],
)
def test_what_is_broken_is_named(folder: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(folder / "model.safetensors")
    (fault,) = faults(folder)
    assert fault.startswith("model.safetensors ")
    assert expected in fault


def test_a_disk_that_cannot_be_read_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> FileSum:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(manifest, "sum_of", fail)
    assert faults(folder)[0] == "config.json cannot be read: Input/output error"


def test_a_damaged_manifest_is_named_itself(folder: Path) -> None:
    whole = (folder / MANIFEST).read_bytes()
    for place in range(len(whole) - 1):  # the last one ends the line
        flip_bit(folder / MANIFEST, place)
        assert faults(folder) == ["manifest.json itself is damaged"], place
        (folder / MANIFEST).write_bytes(whole)
    for content in (b"", b"[]", b"null", whole[: len(whole) // 2]):
        (folder / MANIFEST).write_bytes(content)
        assert faults(folder) == ["manifest.json itself is damaged"], content


def test_a_folder_of_an_older_version_has_nothing_to_be_held_against(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert not has_manifest(folder)
    assert faults(folder) == []


def test_the_shares_of_several_ranks_are_all_files(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink()
    shares = [faults(folder, rank, 2) for rank in range(2)]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == sorted(faults(folder))


def test_the_manifest_is_written_after_all_others_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def record(path: Path) -> None:
        if path.name in ("model.safetensors", "config.json") and path.name not in synced:
            assert not (path.parent / MANIFEST).exists()
        synced.append(path.name)

    monkeypatch.setattr(whole_files, "sync", record)
    write_whole(tmp_path / "final", write_files, Ranks())
    assert MANIFEST in synced


def test_what_had_the_name_before_comes_back_if_the_rename_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == f".{folder.name}.partial":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(
        RunError, match=r"checkpoint-000001 failed.*\.checkpoint-000001\.partial: permission denied"
    ):
        write_whole(folder, write_files, Ranks())
    assert faults(folder) == []
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def write_in_parts(folder: str, lost: bool) -> str | None:
    """What each of two ranks does; rank 1's part is cut short after it was sealed, if it is to be lost."""
    ranks = Ranks.join(needs_group=False)

    def write(partial: Path) -> dict[str, FileSum]:
        part = partial / f"optimizer-{ranks.rank}.pt"
        part.write_bytes(bytes([ranks.rank]) * 5000)
        sums = seal(partial, [part])
        if lost and ranks.rank == 1:
            part.write_bytes(b"half")
        if ranks.is_main:
            (partial / "position.json").write_text("{}")
        return sums

    try:
        write_whole(Path(folder), write, ranks)
    except RunError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_the_parts_of_all_ranks_are_in_the_manifest_and_have_to_arrive(tmp_path: Path) -> None:
    assert run_processes(2, write_in_parts, str(tmp_path / "one"), False) == [None, None]
    listed = json.loads((tmp_path / "one" / MANIFEST).read_text())["files"]
    assert list(listed) == ["optimizer-0.pt", "optimizer-1.pt", "position.json"]
    assert listed["optimizer-1.pt"]["xxh3_128"] == sum_of(tmp_path / "one" / "optimizer-1.pt").xxh3_128
    told = run_processes(2, write_in_parts, str(tmp_path / "two"), True)
    assert told[0] == told[1]
    assert "optimizer-1.pt of another process has not arrived whole" in str(told[0])
    assert not (tmp_path / "two").exists()
