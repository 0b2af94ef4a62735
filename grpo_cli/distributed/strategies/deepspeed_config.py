"""DeepSpeed's settings for a recipe: the user's file or ours, with what the recipe decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import Recipe

RECIPE_DECIDES = {"optimizer": "optim", "scheduler": "optim.scheduler", "fp16": "model.dtype"}
"""Sections of a DeepSpeed file that would take the place of settings of the recipe."""


def deepspeed_config(recipe: Recipe, stage: int) -> dict[str, Any]:
    """Settings for `deepspeed.initialize`.

    Raises:
        UserError: the user's file contradicts the recipe.
    """
    path = recipe.distributed.deepspeed_config
    config = {"zero_optimization": _zero_section(recipe, stage)} if path is None else _read(Path(path))
    is_bfloat16 = recipe.model.dtype == "bfloat16"
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.max_grad_norm,
        # A step's packs are counted by whoever makes them: `step` ends it.
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in ours.items():
        if (given := config.get(key, value)) != value:
            raise UserError(
                f"distributed.deepspeed_config: {key} is {given!r}, but the recipe decides it; remove it"
            )
    if config.get("bf16", {}).get("enabled", is_bfloat16) != is_bfloat16:
        raise UserError(
            f"distributed.deepspeed_config: bf16.enabled contradicts model.dtype ({recipe.model.dtype}); remove it"
        )
    for section, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if not config.get(section, {}).get(key, True):
            raise UserError(
                f"distributed.deepspeed_config: without {section}.{key} a gradient that is not finite would reach "
                "the weights; remove it"
            )
    if not config.get("fp16", {}).get("enabled", False):
        config.pop("fp16", None)
    for key, setting in RECIPE_DECIDES.items():
        if key in config:
            raise UserError(
                f"distributed.deepspeed_config: {key} is the recipe's {setting}; remove it from the file"
            )
    if is_bfloat16:
        # Weights are computed with in bfloat16 and updated in float32, which also sums their gradients.
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    bf16 = config.get("bf16", {}) | {"enabled": is_bfloat16}
    return config | ours | {"steps_per_print": 2**31, "bf16": bf16}


def _read(path: Path) -> dict[str, Any]:
    """The user's file, without what it leaves to others (`auto`, as files for Hugging Face's trainer have)."""
    return _without_auto(json.loads(path.expanduser().read_text(encoding="utf-8")))


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(part) for key, part in value.items() if part != "auto"}
    return value


def _zero_section(recipe: Recipe, stage: int) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    # Reducing while more is computed goes with stage 2 alone, where the caller ends a step.
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": stage == 2 and has_gpu,
    }
    if recipe.distributed.cpu_offload:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": has_gpu}
        if stage == 3:
            section["offload_param"] = {"device": "cpu", "pin_memory": has_gpu}
    return section
