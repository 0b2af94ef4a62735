"""A DeepSpeed file may say how weights are shared out, and nothing that the recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.distributed.strategies.deepspeed_config import deepspeed_config
from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import Recipe


def recipe(tiny_recipe: dict[str, Any], path: Path | None = None, **model: Any) -> Recipe:
    distributed = {"strategy": "zero3", "deepspeed_config": None if path is None else str(path)}
    values = tiny_recipe | {"distributed": distributed, "model": tiny_recipe["model"] | model}
    return Recipe.model_validate(values | {"optim": {"max_grad_norm": 0.5}})


def written(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(settings))
    return path


def test_the_recipe_decides_what_it_has_keys_for(tiny_recipe: dict[str, Any]) -> None:
    config = deepspeed_config(recipe(tiny_recipe), 3)
    assert config["zero_optimization"]["stage"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": False}
    assert "data_types" not in config


def test_bfloat16_weights_have_their_gradients_summed_in_float32(tiny_recipe: dict[str, Any]) -> None:
    config = deepspeed_config(recipe(tiny_recipe, dtype="bfloat16"), 3)
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_what_a_file_leaves_open_is_filled_in(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": 7}
    settings = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    settings["fp16"] = {"enabled": "auto"}
    config = deepspeed_config(recipe(tiny_recipe, written(tmp_path, settings)), 3)
    assert config["zero_optimization"] == {"stage": 3, "sub_group_size": 7}
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": False}


def test_a_file_may_repeat_the_recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": False}, "gradient_clipping": 0.5}
    assert deepspeed_config(recipe(tiny_recipe, written(tmp_path, settings)), 3)["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gradient_clipping": 3.0}, "gradient_clipping is 3.0"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled contradicts model.dtype \(float32\)"),
        ({"fp16": {"enabled": True}}, "fp16 is the recipe's model.dtype"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is the recipe's optim"),
        (
            {"bf16": {"check_grad_overflow": False}},
            "without bf16.check_grad_overflow a gradient that is not finite",
        ),
        ({"zero_optimization": {"compute_grad_norm": False}}, "without zero_optimization.compute_grad_norm"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is the recipe's optim.scheduler"),
    ],
)
def test_a_file_does_not_overrule_the_recipe(
    tiny_recipe: dict[str, Any], tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    path = written(tmp_path, {"zero_optimization": {"stage": 3}} | settings)
    with pytest.raises(UserError, match=told):
        deepspeed_config(recipe(tiny_recipe, path), 3)
