"""Sampling settings know whether they change the distribution, and stay where the recipe's reader expects them."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_cli.recipe.sampling import Sampling
from grpo_cli.recipe.schema import GenerationConfig


@pytest.mark.parametrize(
    ("settings", "filters"),
    [
        ({}, []),
        ({"temperature": 0.5, "max_completion_tokens": 3, "stop": ["\n"]}, []),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}, []),
        ({"top_k": 2}, ["top_k"]),
        ({"repetition_penalty": 0.9, "top_p": 0.9, "min_p": 0.1}, ["top_p", "min_p", "repetition_penalty"]),
    ],
)
def test_filters_are_the_settings_that_change_the_distribution(
    settings: dict[str, Any], filters: list[str]
) -> None:
    sampling = GenerationConfig(**settings)
    assert sampling.filters == filters
    assert sampling.is_filtered == bool(filters)


def test_the_recipe_names_the_engine_first_and_then_how_it_samples() -> None:
    keys = list(GenerationConfig.model_fields)
    assert keys[: 2 + len(Sampling.model_fields)] == ["engine", "num_generations", *Sampling.model_fields]
