"""What a run that is out of memory says: where, what the plan counts, and which settings would make it fit."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

import psutil
import torch

from grpo_cli.distributed.environment import placement, resolve_strategy
from grpo_cli.errors import UserError, one_line
from grpo_cli.plan.memory import GIB
from grpo_cli.plan.relief import advice, settings_by_hand
from grpo_cli.plan.shape import model_size
from grpo_cli.policy.files import locate_gguf
from grpo_cli.recipe.schema import Recipe

ON_THE_GPU = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
ON_THE_CPU = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")
"""What torch says of memory in plain RuntimeErrors."""

GENERATION, TRAINING, STEP = "generation", "training", "optimizer step"

PLACES = (
    ("grpo_cli/rollout/", "", GENERATION),
    ("grpo_cli/train/learner.py", "step", STEP),
    ("grpo_cli/train/learner.py", "", TRAINING),
    ("grpo_cli/train/loop.py", "", TRAINING),
)
"""Part of a file's name, function (any if empty), and the plan's name of what runs there; the first counts."""


def out_of_memory(error: BaseException, recipe: Recipe) -> str | None:
    """The message for an error that says that memory ran out; None for any other error."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError) or ON_THE_GPU.search(said):
        return _on_the_gpu(error, recipe)
    if isinstance(error, MemoryError) or ON_THE_CPU.search(said):
        return _on_the_cpu(error, recipe)
    return None


def phase_of(error: BaseException) -> str | None:
    """The phase of the memory plan in which an error was raised, by the functions that it came through."""
    frames = [(Path(frame.filename).as_posix(), frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    for part, function, phase in PLACES:
        if any(part in file and function in ("", name) for file, name in frames):
            return phase
    return None


def card_gib() -> float:
    """GiB of the GPU that this process computes on."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB


def _on_the_gpu(error: BaseException, recipe: Recipe) -> str:
    phase = phase_of(error)
    during = "" if phase is None else f" during {'the ' * (phase == STEP)}{phase}"
    try:
        folder, _ = locate_gguf(recipe.model.name, recipe.model.gguf_file)
        size = model_size(recipe.model, Path(folder))
        words = advice(_as_started(recipe), size, card_gib(), phase)
    except UserError as problem:
        words = f"the plan cannot count what would fit ({one_line(problem)}); lower {settings_by_hand(recipe)}"
    return f"the GPU is out of memory{during}: {words}\n({one_line(error, 300)})"


def _as_started(recipe: Recipe) -> Recipe:
    """The recipe with the processes and the strategy that the run has, whoever decided on them."""
    update = {
        "processes": placement(os.environ).world_size,
        "strategy": resolve_strategy(recipe.distributed, os.environ),
    }
    return recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update=update)})


def _on_the_cpu(error: BaseException, recipe: Recipe) -> str:
    has = psutil.virtual_memory()
    return (
        f"the machine is out of memory: of its {has.total / GIB:.1f} GiB {has.available / GIB:.1f} are free now. "
        f"The plan counts the memory of GPUs only, and cannot say what would fit: lower "
        f"{settings_by_hand(recipe)}\n({one_line(error, 300)})"
    )
