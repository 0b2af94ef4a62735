"""Small models, and the plan's settings of the recipe for the 72B model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_cli.plan.setup import Setup, setup_of
from grpo_cli.plan.shape import PUBLISHED, ModelSize
from grpo_cli.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
RECIPE_72B = ROOT / "recipes" / "unique_chars_72b.yaml"
SIZE_72B = ModelSize(72_706_203_648, PUBLISHED["Qwen/Qwen2.5-72B"], "test")

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_model(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **(SMALL | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def written(config: Any) -> dict[str, Any]:
    """A configuration as its config.json has it."""
    values: dict[str, Any] = json.loads(config.to_json_string())
    return values


def setup_72b(**changes: Any) -> Setup:
    return replace(setup_of(load_recipe(RECIPE_72B)), **changes)
