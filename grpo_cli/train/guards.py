"""The conditions under which a run computes: its device, precision, order of additions, what its failures say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from grpo_cli.errors import RunError, UserError, one_line
from grpo_cli.plan.nvidia import idle_gpu
from grpo_cli.recipe.schema import ModelConfig, Recipe
from grpo_cli.train.disk import explained
from grpo_cli.train.out_of_memory import out_of_memory

Autocast = Callable[[], AbstractContextManager[Any]]


@contextmanager
def explained_failures(recipe: Recipe) -> Iterator[None]:
    """Turn a full device or disk into a RunError that says what to change."""
    try:
        with explained(Path(recipe.train.output_dir).expanduser()):
            yield
    except (MemoryError, RuntimeError) as error:
        message = out_of_memory(error, recipe)
        if message is None:
            raise
        raise RunError(message) from error


def warn_of_idle_gpu(console: Console) -> None:
    """Say it where nobody overlooks it if the run computes on the CPU of a machine that has an NVIDIA GPU."""
    refusal = None
    if torch.version.cuda is not None and not torch.cuda.is_available():
        refusal = "it finds none"
        try:
            torch.cuda.init()
        except RuntimeError as error:
            refusal = one_line(error, 300)
    warning = idle_gpu(torch.__version__, torch.version.cuda, refusal, os.environ)
    if warning is not None:
        console.print(escape(warning), style="bold yellow", soft_wrap=True)


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """On a CPU, add in a fixed order, whatever the threads do.

    Otherwise the gradient of a prompt's last position, from which every completion of its group starts, is a sum
    in the order in which threads come by. On a GPU some kernels have no such variant: nothing is promised there.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fills


def autocast_for(config: ModelConfig, device: torch.device) -> Autocast:
    """Context manager factory for the precision of forward passes.

    Raises:
        UserError: bfloat16 is asked for on a GPU that has none.
    """
    # Emulated bfloat16, which torch counts as support otherwise, is slower than float32.
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = config.compute_dtype
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" and has_bfloat16 else "float32"
    if wanted == "bfloat16" and not has_bfloat16:
        raise UserError("model.compute_dtype: this GPU has no bfloat16; write float32")
    if wanted == config.dtype or wanted == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
