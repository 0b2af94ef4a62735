"""An NVIDIA GPU that the installed torch cannot use: the run would train on the CPU and not say why. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grpo_cli.plan.fit import gpu_memory

HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES with which a user hides all GPUs."""


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether the driver is loaded or a device is there below `root`, or `nvidia-smi` finds a GPU."""
    is_driver_loaded = (root / "proc/driver/nvidia/version").exists()
    return is_driver_loaded or any((root / "dev").glob("nvidia[0-9]*")) or gpu_memory() is not None


def idle_gpu(
    torch_version: str,
    cuda: str | None,
    refusal: str | None,
    environment: Mapping[str, str],
    *,
    root: Path = Path("/"),
) -> str | None:
    """A warning about a GPU that the run will not use, and what to do; None if there is no such GPU.

    Args:
        torch_version: of the installed torch.
        cuda: the version of CUDA that it is built with; None for a build without.
        refusal: why torch cannot use CUDA, if it cannot.
        environment: in which GPUs may be hidden on purpose.
        root: folder of /dev and /proc.
    """
    if environment.get("CUDA_VISIBLE_DEVICES") in HIDDEN or (cuda is not None and refusal is None):
        return None
    if not has_nvidia_gpu(root):
        return None
    if cuda is None:
        why = f"the installed torch ({torch_version}) is a build without CUDA"
        release = torch_version.partition("+")[0]
        what = (
            f"`pip uninstall -y torch`, then `pip install torch=={release}` without an index of CPU builds (or "
            "the command that PyTorch's install page gives for your version of CUDA)"
        )
    else:
        why = f"torch {torch_version}, built with CUDA {cuda}, cannot use it ({refusal})"
        what = (
            "update the NVIDIA driver, or install a torch that is built with the CUDA that `nvidia-smi` shows, or "
            "an older one"
        )
        if chosen := environment.get("CUDA_VISIBLE_DEVICES"):
            what = f"see whether CUDA_VISIBLE_DEVICES={chosen} names one that there is; else {what}"
    return (
        f"WARNING: this machine has an NVIDIA GPU, but {why}: training runs on the CPU, many times slower. To use "
        f"the GPU: {what}. If the CPU is meant, set CUDA_VISIBLE_DEVICES=-1, and this warning goes."
    )


def idle_gpu_by_metadata(environment: Mapping[str, str]) -> str | None:
    """The same without importing torch, for a build that calls itself one for CPUs."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        return None
    return idle_gpu(torch_version, None, None, environment) if torch_version.endswith("+cpu") else None
