"""After a run was out of memory: changes that the plan says are enough, each by itself."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_cli.plan.memory import GIB, memory_plan
from grpo_cli.plan.relief import Relief, advice, changed, reliefs
from grpo_cli.plan.setup import setup_of
from grpo_cli.plan.shape import PUBLISHED, ModelSize
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import Recipe
from tests.plan.models import RECIPE_72B, ROOT, SIZE_72B

SHAPE = PUBLISHED["Qwen/Qwen2.5-1.5B-Instruct"]
SIZE = ModelSize(SHAPE.parameters, SHAPE, "test")


def recipe_of(*overrides: str, path: Any = ROOT / "recipes" / "gsm8k.yaml") -> Recipe:
    return load_recipe(path, list(overrides))


def keys_of(found: list[Relief]) -> set[str]:
    return {key for relief in found for key in relief.changes}


def as_override(key: str, value: Any) -> str:
    return f"{key}={{}}" if key == "model.lora" else f"{key}={str(value).lower()}"


@pytest.mark.parametrize("phase", [None, "generation", "training"])
@pytest.mark.parametrize(
    ("overrides", "gib"),
    [
        (["model.gradient_checkpointing=false", "train.max_tokens_per_microbatch=16384"], 60),
        (["generation.num_generations=64", "generation.max_completion_tokens=900"], 36),
        (["distributed.processes=4"], 24),
        ([], 30),
    ],
)
def test_each_change_that_is_named_fits_when_the_recipe_says_it(
    overrides: list[str], gib: float, phase: str | None
) -> None:
    recipe = recipe_of(*overrides)
    found = reliefs(recipe, SIZE, gib, phase)
    assert 1 <= len(found) <= 3
    for relief in found:
        followed = [as_override(key, new) for key, (_, new) in relief.changes.items()]
        again = memory_plan(setup_of(recipe_of(*overrides, *followed)), SIZE)
        assert again.peak == relief.peak <= gib * GIB
    assert len({tuple(relief.changes) for relief in found}) == len(found)


def test_the_mildest_value_of_a_setting_that_fits_is_the_one_that_is_named() -> None:
    recipe = recipe_of("model.gradient_checkpointing=false", "train.max_tokens_per_microbatch=16384")
    relief = reliefs(recipe, SIZE, 60)[0]
    ((key, (old, new)),) = relief.changes.items()
    assert (key, old) == ("train.max_tokens_per_microbatch", 16384)
    twice = changed(recipe, {key: (old, 2 * new)})
    assert memory_plan(setup_of(twice), SIZE).peak > 60 * GIB


def test_a_line_says_from_what_to_what_and_what_is_then_needed() -> None:
    relief = Relief({"train.max_tokens_per_microbatch": (8192, 4096)}, 61 * GIB)
    assert relief.line(79.2) == "train.max_tokens_per_microbatch: 8192 -> 4096 needs 61.0 GiB of 79.2"
    relief = Relief({"distributed.processes": (1, 2), "distributed.strategy": ("none", "zero3")}, GIB)
    assert (
        relief.line(24)
        == "distributed.processes: 1 -> 2, distributed.strategy: none -> zero3 needs 1.0 GiB of 24.0"
    )


def test_the_72b_recipe_on_smaller_gpus_is_told_what_the_plan_counts_and_what_fits() -> None:
    words = advice(recipe_of(path=RECIPE_72B), SIZE_72B, 64, "training")
    first, *lines = words.splitlines()
    assert first.startswith("the plan counts 67.3 GiB of 64.0 in training (optimizer 25.4, activations 10.0, ")
    assert lines[0] == "  train.max_tokens_per_microbatch: 8192 -> 4096 needs 62.3 GiB of 64.0"
    assert len(lines) == 3


def test_what_does_not_lower_the_phase_that_failed_is_not_named() -> None:
    shape = PUBLISHED["Qwen/Qwen2-0.5B-Instruct"]
    size = ModelSize(shape.parameters, shape, "test")
    recipe = recipe_of("model.gradient_checkpointing=false")
    keys = {phase: keys_of(reliefs(recipe, size, 1000, phase)) for phase in ("generation", "training")}
    assert "generation.num_generations" in keys["generation"] - keys["training"]
    assert "model.gradient_checkpointing" in keys["training"] - keys["generation"]


def test_a_plan_that_fits_says_what_else_may_take_memory() -> None:
    words = advice(recipe_of(), SIZE, 1000, "training")
    assert "which should have fitted: other processes may hold memory (nvidia-smi shows them)" in words
    assert "of 1000.0" in words.splitlines()[1]


def test_what_the_plan_cannot_count_is_said_with_the_settings_to_try() -> None:
    words = advice(recipe_of(), ModelSize(None, None, "known once the model is loaded: no config"), 80)
    assert words.startswith(
        "the plan cannot count what would fit (known once the model is loaded: no config); lower"
    )
    assert "generation.num_generations (now 8)" in words
    words = advice(recipe_of(), ModelSize(10**9, None, "the safetensors files"), 80)
    assert "its config.json is of a kind not known here" in words


def test_where_no_single_change_is_enough_it_says_so() -> None:
    assert "no setting makes it fit by the plan: take a smaller model" in advice(recipe_of(), SIZE, 1)
    many = recipe_of(
        "model.lora={}", "loss.beta=0", "model.gradient_checkpointing=false",
        "train.max_tokens_per_microbatch=4096", "generation.num_generations=64",
        "generation.max_completion_tokens=900",
    )  # fmt: skip
    words = advice(many, SIZE, 12)
    assert "no setting alone is enough, by the plan " in words
    assert " together need " in words
