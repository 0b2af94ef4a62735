"""The table has a row for each name, and rows that can be."""

from __future__ import annotations

from typing import get_args

import pytest

from grpo_cli.recipe.strategies import STRATEGIES, StrategyName, names_of


def test_every_strategy_has_a_row() -> None:
    assert set(STRATEGIES) == set(get_args(StrategyName))


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_shards_more_shards_all_that_others_do(name: StrategyName) -> None:
    traits = STRATEGIES[name]
    assert traits.shards_weights <= traits.shards_gradients <= traits.shards_optimizer
    assert not (traits.for_one_process and traits.shards_optimizer)


def test_deepspeed_has_one_strategy_for_each_stage_of_zero() -> None:
    stages = {name: traits.zero_stage for name, traits in STRATEGIES.items() if traits.uses_deepspeed}
    assert stages == {"zero1": 1, "zero2": 2, "zero3": 3}
    for traits in map(STRATEGIES.__getitem__, stages):
        shared = (traits.shards_optimizer, traits.shards_gradients, traits.shards_weights)
        assert sum(shared) == traits.zero_stage


def test_a_message_names_the_strategies_that_a_setting_is_for() -> None:
    assert names_of(lambda traits: traits.uses_deepspeed, "and") == "zero1, zero2 and zero3"
    assert names_of(lambda traits: traits.shards_weights, "or") == "zero3 or fsdp"
