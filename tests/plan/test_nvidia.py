"""A GPU that the installed torch cannot use is said, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_cli.plan import nvidia
from grpo_cli.plan.nvidia import has_nvidia_gpu, idle_gpu, idle_gpu_by_metadata


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine with a GPU, whose nvidia-smi is not on the PATH."""
    monkeypatch.setattr(nvidia, "gpu_memory", lambda: None)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    return tmp_path


def test_a_gpu_shows_by_its_driver_its_device_or_nvidia_smi(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert has_nvidia_gpu(machine)
    (machine / "dev" / "nvidia0").unlink()
    (machine / "dev" / "nvidia-uvm").touch()  # there without a GPU, too
    assert not has_nvidia_gpu(machine)
    (machine / "proc" / "driver" / "nvidia").mkdir(parents=True)
    (machine / "proc" / "driver" / "nvidia" / "version").touch()
    assert has_nvidia_gpu(machine)
    monkeypatch.setattr(nvidia, "gpu_memory", lambda: 80.0)
    assert has_nvidia_gpu(tmp_path / "elsewhere")


def test_a_torch_without_cuda_is_told_with_the_command_that_replaces_it(machine: Path) -> None:
    warning = idle_gpu("2.13.0+cpu", None, None, {}, root=machine)
    assert warning is not None
    assert warning.startswith("WARNING: this machine has an NVIDIA GPU, but the installed torch (2.13.0+cpu) is a")
    assert "training runs on the CPU" in warning
    assert "`pip uninstall -y torch`, then `pip install torch==2.13.0`" in warning
    assert "//" not in warning


def test_a_torch_whose_cuda_does_not_start_is_told_with_the_reason(machine: Path) -> None:
    reason = "The NVIDIA driver on your system is too old (found version 11040)."
    warning = idle_gpu("2.13.0", "13.0", reason, {}, root=machine)
    assert warning is not None
    assert reason in warning
    assert "update the NVIDIA driver" in warning
    warning = idle_gpu("2.13.0", "13.0", "No CUDA GPUs are available", {"CUDA_VISIBLE_DEVICES": "7"}, root=machine)
    assert warning is not None
    assert "To use the GPU: see whether CUDA_VISIBLE_DEVICES=7 names one that there is; else update" in warning


def test_nothing_is_said_where_cuda_works_no_gpu_is_there_or_it_is_hidden_on_purpose(
    machine: Path, tmp_path: Path
) -> None:
    assert idle_gpu("2.13.0", "13.0", None, {}, root=machine) is None
    assert idle_gpu("2.13.0+cpu", None, None, {}, root=tmp_path / "elsewhere") is None
    for hidden in ("", "-1"):
        assert idle_gpu("2.13.0+cpu", None, None, {"CUDA_VISIBLE_DEVICES": hidden}, root=machine) is None
    assert idle_gpu("2.13.0+cpu", None, None, {"CUDA_VISIBLE_DEVICES": "0"}, root=machine) is not None


def test_without_torch_only_a_build_that_says_so_is_known_to_be_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "gpu_memory", lambda: 80.0)
    for version, is_told in (("2.13.0+cpu", True), ("2.13.0", False), ("2.13.0+cu130", False)):
        monkeypatch.setattr(nvidia, "version", lambda _, version=version: version)
        assert (idle_gpu_by_metadata({}) is not None) == is_told
