"""`grpo check RUN` verifies what a run has written, without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from grpo_cli import cli
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import UserError
from grpo_cli.train.manifest import MANIFEST
from grpo_cli.train.run_lock import RunLock
from grpo_cli.train.whole_files import write_whole
from grpo_cli.verbs.check_run import check_run
from tests.processes import ROOT
from tests.train.test_checkpoint import contents
from tests.train.test_manifest import flip_bit, write_files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with the files of a run that matter here; that of its position is empty."""
    (tmp_path / "run").mkdir()
    for name in ("checkpoint-000001", "checkpoint-000002", "final"):
        write_whole(tmp_path / "run" / name, write_files, Ranks())
    (tmp_path / "run" / "recipe.yaml").write_text("")
    return tmp_path / "run"


def rows_of(run: Path, *, broken: str = "") -> dict[str, str]:
    """What is printed, by its first word; `broken` is looked for in the error, if there is to be one."""
    console = Console(width=300, record=True)
    with pytest.raises(UserError, match=re.escape(broken)) if broken else nullcontext():
        check_run(run, console)
    lines = [line.split(maxsplit=1) for line in console.export_text().splitlines()]
    return {line[0]: line[1].strip() for line in lines}


def test_a_whole_run_has_a_row_for_each_checkpoint_and_nothing_is_written(run: Path) -> None:
    before = contents(run)
    rows = rows_of(run)
    assert list(rows) == ["checkpoint-000001", "checkpoint-000002", "final"]
    assert all(row == "whole, 0.0 MB" for row in rows.values())
    assert contents(run) == before


def test_what_is_broken_is_named_and_ends_with_2(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(run / "checkpoint-000002" / "model.safetensors")
    (run / "final" / "config.json").unlink()
    rows = rows_of(run, broken=f"{run}/checkpoint-000002: model.safetensors has other bytes")
    assert rows["checkpoint-000001"].startswith("whole")
    assert rows["checkpoint-000002"].startswith("broken: model.safetensors has other bytes")
    assert rows["final"] == "broken: config.json is missing"
    monkeypatch.setattr(sys, "argv", ["grpo", "check", str(run)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert f"{run}/final: config.json is missing" in capsys.readouterr().err


def test_what_an_older_version_wrote_cannot_be_verified(run: Path) -> None:
    (run / "final" / MANIFEST).unlink()
    assert rows_of(run)["final"] == "cannot be verified: it has no manifest.json, as those of older versions"


def test_what_was_set_aside_and_who_is_at_work_is_told(run: Path) -> None:
    (run / "checkpoint-000002").rename(run / "broken-checkpoint-000002")
    flip_bit(run / "broken-checkpoint-000002" / "model.safetensors")
    assert rows_of(run)["broken-checkpoint-000002"].startswith("set aside by an earlier --resume")
    hold = "import sys, pathlib, grpo_cli.train.run_lock as lock\n"
    hold += "held = lock.RunLock(pathlib.Path(sys.argv[1]), print); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert f"process {process.pid}" in rows_of(run)["in"]
        process.kill()
    with closing(RunLock(run, pytest.fail)):
        pass
    assert "in" not in rows_of(run)


def test_a_run_without_checkpoints_has_none_yet(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    assert rows_of(tmp_path) == {"checkpoints": "none yet"}


def test_a_folder_that_is_no_run_and_options_of_a_recipe_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"final is not the folder of a run: there is no recipe\.yaml in it"):
        check_run(run / "final", Console())
    monkeypatch.setattr(sys, "argv", ["grpo", "check", str(run), "--set", "train.seed=1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--set and --gpu-memory are for recipes" in capsys.readouterr().err


def test_no_torch_is_imported(run: Path) -> None:
    program = "import sys; from grpo_cli.cli import app\n"
    program += f"app(['check', {str(run)!r}], standalone_mode=False)\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-000002" in done.stdout
