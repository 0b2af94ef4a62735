"""A temporary folder is its process's alone, and does not stay when the process has gone."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
from pathlib import Path

import pytest

from grpo_cli.serve import own_folder
from grpo_cli.serve.own_folder import OWNER, OwnFolder, sweep


def test_it_is_for_the_user_alone_says_its_note_and_goes(tmp_path: Path) -> None:
    folder = OwnFolder("grpo-x-", str(tmp_path), "0123")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert folder.owner.read_text() == "0123"
    with folder as path:
        assert path == folder.path
        (path / "file").write_text("more")
    assert not list(tmp_path.iterdir())
    folder.remove()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process = os.fork()
    if not process:
        OwnFolder("grpo-x-", str(tmp_path))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    (left,) = tmp_path.iterdir()
    with OwnFolder("grpo-y-", str(tmp_path)):
        assert left.exists(), "folders of another kind are not looked at"
    with OwnFolder("grpo-x-", str(tmp_path)) as path:
        assert list(tmp_path.iterdir()) == [path]


def test_what_runs_starts_or_is_no_folder_of_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, running, starting, other = (
        tmp_path / f"grpo-x-{name}" for name in ("left", "running", "starting", "other")
    )
    for folder in (left, running, starting):
        folder.mkdir()
        (folder / OWNER).write_text("" if folder is starting else "0123")
    other.mkdir()
    with (running / OWNER).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with monkeypatch.context() as patch:
            patch.setattr(own_folder.os, "geteuid", lambda: 12345)
            sweep(str(tmp_path), "grpo-x-")
        assert left.exists(), "another user's"
        sweep(str(tmp_path), "grpo-x-")
    assert not left.exists()
    assert running.exists()
    assert starting.exists()
    assert other.exists()
