"""The disk that forgets: what was synced is there after a loss of power, and nothing else has to be."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.disk import Watch, start_watching, write_remembered
from tests.processes import run_processes

pytestmark = pytest.mark.slow


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_some(run: Path, notes: Path) -> None:
    Watch(run, notes).begin()
    (run / "old").unlink()
    (run / "appended").open("a").write("more")
    for name in ("synced", "named", "filled"):
        (run / f".{name}").mkdir()
        (run / f".{name}" / "file").write_text(name)
    sync(run / ".synced" / "file")
    sync(run / ".synced")
    sync(run / ".named")
    os.rename(run / ".synced", run / "synced")
    os.rename(run / ".named", run / "named")
    sync(run)
    os.rename(run / ".filled", run / "filled")
    (run / "appended").open("a").write("most")


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_was_synced_stays_and_the_rest_may_be_anything(tmp_path: Path) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    run.mkdir()
    (run / "old").write_text("old")
    (run / "appended").write_text("some")
    start_watching(run, notes)
    run_processes(1, write_some, run, notes)
    outcomes = []
    for seed in range(30):
        write_remembered(run, notes, random.Random(seed), tmp_path / str(seed))
        outcomes.append(files_of(tmp_path / str(seed)))
    for files in outcomes:
        assert "old" not in files, "its removal was synced with the folder"
        assert files["synced/file"] == "synced"
        assert files["appended"].startswith("some")
        assert files["named/file"].rstrip("\0") in "named"
    seen = [{name: files.get(name) for name in ("named/file", "filled/file", "appended")} for files in outcomes]
    assert len({files["named/file"] for files in seen}) > 1, "a name without contents is one of the outcomes"
    assert {"somemoremost", "some"} <= {files["appended"] for files in seen}
    assert None in {files["filled/file"] for files in seen}
