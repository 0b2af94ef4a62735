"""One run at a time has a folder, whatever becomes of the one before."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_cli.errors import RunError, UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.train import run_lock
from grpo_cli.train.run_folder import check_run_folder
from grpo_cli.train.run_lock import RunLock, holder
from tests.processes import ROOT, Command
from tests.train.test_checkpoint import Parts, contents

HOLD = """
import os, sys, time
from pathlib import Path
from grpo_cli.train.run_lock import RunLock
try:
    lock = RunLock(Path(sys.argv[1]), print)
except Exception as error:
    print(error, flush=True)
else:
    child = os.fork() if sys.argv[2:] == ["and fork"] else None
    if child == 0:
        os.close(1)
    else:
        print("held", child or "", flush=True)
    time.sleep(100)
"""

Holder = subprocess.Popen[str]


@pytest.fixture
def hold() -> Iterator[Callable[..., Holder]]:
    """Starts a process that holds a folder."""
    started: list[Holder] = []

    def start(folder: Path, *options: str) -> Holder:
        command = [sys.executable, "-c", HOLD, str(folder), *options]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: Holder) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_start_says_who_holds_the_folder_and_writes_nothing(
    tiny_recipe: dict[str, Any], hold: Callable[..., Holder], resume: bool
) -> None:
    recipe = load_recipe(tiny_recipe)
    folder = Path(recipe.train.output_dir)
    folder.mkdir()
    Parts().save(folder, 2)
    process = hold(folder)
    assert said(process) == "held"
    before = contents(folder)
    with pytest.raises(UserError, match=rf"in use .*host .*, process {process.pid}, since \d{{4}}-"):
        check_run_folder(recipe, resume=resume)
    with pytest.raises(UserError, match=rf"in use .*process {process.pid},"):
        RunLock(folder, pytest.fail)
    assert contents(folder) == before


def test_a_folder_is_free_as_soon_as_its_holder_is_killed(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    process = hold(tmp_path)
    assert said(process) == "held"
    process.kill()
    with closing(RunLock(tmp_path, pytest.fail)):  # waits for the process to be gone
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
    assert holder(tmp_path) is None
    assert (tmp_path / ".lock").read_bytes() == b""


def test_a_resumed_run_waits_for_a_machine_that_may_have_vanished(
    tiny_recipe: dict[str, Any], hold: Callable[..., Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny_recipe)
    folder = Path(recipe.train.output_dir)
    folder.mkdir()
    process = hold(folder)
    assert said(process) == "held"
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(run_lock, "LEASE_S", 0.3)
    notes: list[str] = []
    with pytest.raises(UserError, match="in use"):
        check_run_folder(recipe, resume=True, note=notes.append)
    monkeypatch.setattr(run_lock, "LEASE_S", 60)
    threading.Timer(0.3, process.kill).start()
    check_run_folder(recipe, resume=True, note=notes.append)
    assert all("held by a run on another machine" in note for note in notes)
    assert len(notes) == 2


def test_a_child_of_a_holder_that_was_killed_keeps_nothing(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    process = hold(tmp_path, "and fork")
    child = int(said(process).removeprefix("held "))
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        RunLock(tmp_path, pytest.fail).close()
    finally:
        os.kill(child, signal.SIGKILL)


def lose(folder: Path) -> None:
    """As a callback does that copies the folder."""
    (folder / ".lock").read_bytes()


def test_a_lock_that_was_lost_is_taken_again_before_a_checkpoint(
    tmp_path: Path, hold: Callable[..., Holder]
) -> None:
    with closing(RunLock(tmp_path, pytest.fail)) as lock:
        lose(tmp_path)
        lock.keep()
        assert "in use" in said(hold(tmp_path))
        (tmp_path / ".lock").unlink()
        lock.keep()
        assert f"process {os.getpid()}," in said(hold(tmp_path))


def test_a_run_ends_if_another_has_taken_its_folder(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    with closing(RunLock(tmp_path, pytest.fail)) as lock:
        lose(tmp_path)
        other = hold(tmp_path)
        assert said(other) == "held"
        with pytest.raises(RunError, match=rf"process {other.pid},.*This run ends"):
            lock.keep()


def test_a_run_whose_folder_is_gone_does_not_make_it_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with closing(RunLock(folder, pytest.fail)) as lock:
        shutil.rmtree(folder)
        with pytest.raises(FileNotFoundError):
            lock.keep()
    assert not folder.exists()


def test_a_file_system_without_locks_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    notes: list[str] = []
    RunLock(tmp_path, notes.append).close()
    assert "cannot be locked (No locks available)" in notes[0]
    assert holder(tmp_path) is None


@pytest.mark.slow
def test_a_run_that_is_going_on_is_not_resumed(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny_recipe["train"] |= {"max_steps": 5000, "save_every": 2}
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(tiny_recipe))
    first = Command("train", path)
    try:
        while first.poll() is None and not (run / "checkpoint-000002").exists():
            time.sleep(0.05)
        for options in ((), ("--resume",)):
            second = Command("train", path, *options)
            output, _ = second.communicate(timeout=120)
            assert second.returncode == 2, output
            assert f"process {first.pid}," in output
    finally:
        first.kill()
        first.wait()
    resumed = Command("train", path, "--resume", "--set", "train.max_steps=1")
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
