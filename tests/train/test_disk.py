"""What a disk refuses is one message: which file, why, and what to do."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import grpo_cli
from grpo_cli.errors import RunError
from grpo_cli.train.disk import explained, sentence, writing
from grpo_cli.train.manifest import faults
from grpo_cli.train.metrics import MetricsFile
from grpo_cli.train.whole_files import write_text
from tests.train.test_checkpoint import Parts, contents, full_disk, names
from tests.train.test_loop import numbers


def write_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, path)


def write_safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(100_000)}, path)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"a": [os.urandom(20) for _ in range(20_000)]}), path)


def write_plain(path: Path) -> None:
    path.write_text("x" * 400_000)


WRITERS = [write_torch, write_safetensors, write_parquet, write_plain]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_known_whoever_writes(small_disk: Path, write: Callable[[Path], None]) -> None:
    path = small_disk / "file"
    with pytest.raises(RunError) as caught, explained(small_disk), writing(path):
        write(path)
    assert re.match(rf"{path}: no space is left on the disk \(0\.\d MB are free\); make room", str(caught.value))


@pytest.mark.parametrize("write", WRITERS)
def test_a_limit_of_a_file_s_size_is_known_whoever_writes(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="File too large") as caught, full_disk(100_000), writing(path):
        write(path)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert not list(tmp_path.glob(".probe*"))


def test_a_run_that_filled_its_disk_goes_on_once_there_is_room(
    tiny_recipe: dict[str, Any], small_disk: Path, tmp_path: Path
) -> None:
    tiny_recipe["train"] |= {"max_steps": 3, "save_every": 1, "output_dir": str(tmp_path / "whole")}
    tiny_recipe["logging"] = {"trackers": ["tensorboard"]}
    whole = grpo_cli.train(tiny_recipe).output_dir
    run = small_disk / "run"
    tiny_recipe["train"]["output_dir"] = str(run)
    for size in ("100k", "900k"):
        subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)
        with pytest.raises(RunError, match=rf"{run}/.*: no space is left on the disk .*; make room"):
            grpo_cli.train(tiny_recipe, resume=True)
    assert faults(run / "checkpoint-000001") == []
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    grpo_cli.train(tiny_recipe, resume=True)
    for name in ("checkpoint-000003", "final"):
        assert contents(run / name) == contents(whole / name)
    assert numbers(run / "metrics.jsonl") == numbers(whole / "metrics.jsonl")


def test_a_checkpoint_that_does_not_fit_names_the_file(small_disk: Path) -> None:
    with pytest.raises(
        RunError, match=r"optimizer\.pt: no space is left on the disk \(0\.0 MB are free\); make room"
    ):
        Parts(steps=1).save(small_disk, 1)
    assert names(small_disk) == []


def test_a_row_of_metrics_that_does_not_fit_names_the_file(small_disk: Path) -> None:
    metrics = MetricsFile(small_disk / "metrics.jsonl", 0)
    with pytest.raises(RunError, match=r"metrics\.jsonl: no space is left"), explained(small_disk):
        metrics.append({"step": 1, "x" * 400_000: 1.0})


def test_what_torch_does_not_explain_is_a_disk_that_failed_or_was_full(tmp_path: Path) -> None:
    message = "[enforce fail at inline_container.cc:672] . unexpected pos 388736 vs 388626"
    with pytest.raises(RunError) as caught, explained(tmp_path), writing(tmp_path / "optimizer.pt"):
        raise RuntimeError(message)
    assert str(caught.value).startswith(f"{tmp_path}/optimizer.pt: the disk failed or was full; look for")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), OSError("no number")])
def test_what_no_disk_says_is_left_alone(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained(tmp_path), writing(tmp_path / "optimizer.pt"):
        raise error
    assert caught.value is error
    assert sentence(error, tmp_path) == str(error)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EDQUOT, "the disk quota is used up; make room"),
        (errno.EROFS, "the file system is read-only; have it mounted for writing"),
        (errno.EACCES, "permission denied; make it writable for this user"),
        (errno.ENOENT, "it, or its folder, is gone; find out what removes files"),
    ],
)
def test_each_reason_is_told_in_plain_words(tmp_path: Path, number: int, expected: str) -> None:
    path = tmp_path / "completions" / "step-000001.parquet"
    with pytest.raises(RunError) as caught, explained(tmp_path):
        raise OSError(number, os.strerror(number), str(path))
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert str(caught.value).endswith("then --resume")


def test_what_is_not_of_the_run_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), explained(tmp_path / "run"):
        (tmp_path / "data.json").read_text()
    with pytest.raises(PermissionError), explained(tmp_path / "run"):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))  # as of a process that may not be stopped
    with pytest.raises(RunError, match="no space is left"), explained(tmp_path / "run"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/file")


def test_a_folder_that_is_removed_under_a_run_is_one_message(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.path.unlink()
    tmp_path.rmdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: it, or its folder, is gone"), explained(tmp_path):
        metrics.append({"step": 1})
    with pytest.raises(RunError, match=r"recipe\.yaml.*is gone"), explained(tmp_path):
        write_text(tmp_path / "recipe.yaml", "")
