"""The machine part of `benchmarks.gpu`: what is installed and what the card does at its best."""

from __future__ import annotations

import platform
from importlib import metadata

from benchmarks._gpu_arithmetic import GIB, peak_flops
from benchmarks._gpu_results import Finding, Part
from benchmarks._machine import device_name, rates

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "numpy")


def versions() -> str:
    """Python, CUDA and the packages that figures depend on."""
    import torch

    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"Python {platform.python_version()}, CUDA {torch.version.cuda}, {', '.join(found)}"


def run(piece: str, device: str, rehearse: bool) -> Finding:
    import torch

    name = device_name(device)
    best = rates(device, 1 if rehearse else 12)
    peak = peak_flops(name)
    memory = f"{torch.cuda.get_device_properties(0).total_memory / GIB:.1f}" if device == "cuda" else ""
    row = [
        name,
        memory,
        "unknown" if peak is None else f"{peak / 1e12:.0f}",
        f"{best['flops'] / 1e12:.1f}",
        "" if peak is None else f"{best['flops'] / peak:.0%}",
        f"{best['read_bytes'] / 1e12:.2f}",
    ]
    return Finding([row], notes=[versions()])


ABOUT = """
Peak is the data sheet's for dense bfloat16 and what shares of the peak are shares of. Beside it a product of two
8192 × 8192 bfloat16 matrices of random numbers, and the sum of a tensor of 4 GiB: medians of 12.
"""

PART = Part(
    name="machine",
    title="The machine",
    about=ABOUT,
    columns=("card", "GiB", "peak TFLOP/s", "matmul TFLOP/s", "of peak", "read TB/s"),
    limit_s=180,
    pieces=("card",),
    rehearsed=("card",),
    run=run,
)
