"""What a disk refuses is survived, or ends the run with one message that names the file; nothing is lost by it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Bench, Session, difference, state_of
from tests.faults.points import Fault, Plan

pytestmark = pytest.mark.slow


@pytest.fixture
def one(bench: Callable[[str], Bench]) -> Bench:
    return bench("one process")


def start(one: Bench, run: Path, notes: Path, fault: Fault | None = None, **options: bool) -> Session:
    notes.mkdir(parents=True)
    return one.session(Plan(run, notes, fault, **options))


def assert_one_message(session: Session, *names: str | Path) -> None:
    assert session.codes[0] in (1, 2), session.output
    assert "Traceback" not in session.output
    last = session.output.strip().splitlines()[-1].casefold()
    assert all(str(name).casefold() in last for name in names), session.output


def assert_ends_the_same(one: Bench, run: Path, notes: Path) -> None:
    session = start(one, run, notes)
    assert session.codes == [0], session.output
    assert difference(state_of(run), one.wanted) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "grpo-faults", folder], capture_output=True)
    if done.returncode:
        pytest.skip("a file system can only be mounted as root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("room", [2, 6, 40, 150, 300, 470, 600, 900])
def test_a_full_disk_is_one_message_and_room_goes_on_to_the_same_end(
    one: Bench, small_disk: Path, tmp_path: Path, room: int
) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    left = os.statvfs(small_disk)
    filler.write_bytes(bytes(left.f_bavail * left.f_bsize - (room << 10)))
    session = start(one, run, tmp_path / "full")
    assert_one_message(session, run, "no space")
    filler.unlink()
    assert_ends_the_same(one, run, tmp_path / "again")


def test_a_read_only_folder_is_one_message(one: Bench, small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_one_message(start(one, small_disk / "run", tmp_path / "notes"), small_disk, "read-only")


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize(
    ("point", "by"),
    [
        ("open to write", "ENOSPC"), ("open to write", "EROFS"), ("mkdir", "EACCES"), ("rename", "EIO"),
        ("replace", "EIO"), ("fsync", "EIO"), ("fsync", "ENOSPC"), ("unlink", "EACCES"),
    ],
)  # fmt: skip
def test_what_is_refused_is_survived_or_one_message_that_names_the_file(
    one: Bench, tmp_path: Path, point: str, by: str, number: int
) -> None:
    calls = one.moments[0][point] // 2
    run = tmp_path / "run"
    fault = Fault(point, 2 * (calls * (number + 1) // 3) + 1, by)
    session = start(one, run, tmp_path / "refused", fault)
    assert session.was_struck
    if any(session.codes):
        assert_one_message(session, run)
    assert_ends_the_same(one, run, tmp_path / "again")


@pytest.mark.parametrize("point", ["generation", "metrics", "checkpoint", "final", "rename"])
def test_a_folder_that_is_deleted_under_a_run_is_one_message(one: Bench, tmp_path: Path, point: str) -> None:
    run = tmp_path / "run"
    session = start(one, run, tmp_path / "notes", Fault(point, 3 if point != "final" else 1, "folder deleted"))
    assert session.was_struck
    assert_one_message(session, run)
    shutil.rmtree(run, ignore_errors=True)
    assert_ends_the_same(one, run, tmp_path / "again")


def test_a_clock_that_goes_back_changes_nothing(one: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    session = start(one, run, tmp_path / "notes", clock_goes_back=True)
    assert session.codes == [0], session.output
    assert difference(state_of(run), one.wanted) is None
