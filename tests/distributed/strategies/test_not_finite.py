"""Under each strategy an optimizer step whose gradient is not finite leaves everything as it was, on all ranks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import Strategy, make_strategy
from grpo_cli.distributed.strategies.base import MASTER, GradientNotFinite, joined_state
from grpo_cli.policy.export import gathered_weights
from grpo_cli.recipe.schema import Recipe
from grpo_cli.train.optim import build_optimizer
from tests.conftest import tiny_llama
from tests.processes import run_processes

TOKENS = torch.arange(12).view(2, 6)
"""A row for each rank."""


def step(strategy: Strategy, model: Any, rank: int, spoilt: float | None) -> float:
    """An optimizer step; with `spoilt` rank 1's loss is multiplied by it."""

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, use_cache=False).logits.float().logsumexp(-1).square().mean()

    strategy.zero_grad()
    tokens = TOKENS[rank : rank + 1]
    value = strategy.run(loss, tokens) if strategy.run is not None else loss(tokens)
    strategy.backward(value * spoilt if spoilt is not None and rank == 1 else value)
    return strategy.step()


def trained(
    recipe: dict[str, Any], name: Any, steps: list[float | None], before: dict[str, Any] | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """What each step gives, and weights and optimizer state after them; `before` is what they begin with."""
    settings = Recipe.model_validate(recipe)
    ranks = Ranks.join(needs_group=True)
    strategy, model = make_strategy(name, settings, ranks), tiny_llama().to(getattr(torch, settings.model.dtype))
    strategy.take(model)
    optimizer = build_optimizer(model, settings.optim, strategy.whole_shape)
    strategy.prepare(model, optimizer)
    if before is not None:
        strategy.restore(before["weights"] if ranks.is_main else None, before["state"])
    given: list[Any] = []
    for spoilt in steps:
        try:
            given.append(step(strategy, model, ranks.rank, spoilt))
        except GradientNotFinite as error:
            given.append(str(error))
    weights = gathered_weights(model, strategy, ranks.is_main)
    state = joined_state(ranks.gather(strategy.optimizer_state()))
    return given, {"weights": weights, "state": state}


def all_runs(recipe: dict[str, Any], name: str) -> list[Any]:
    runs = [[None], [None, None], [None, math.nan, None], [math.inf, None], [math.nan]]
    done = [trained(recipe, name, steps) for steps in runs]
    return [*done, trained(recipe, name, [None], copy.deepcopy(done[-1][1]))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "offload"),
    [
        ("ddp", "float32", False),
        ("zero1", "float32", False),
        ("zero1", "bfloat16", False),
        ("zero2", "float32", False),
        ("zero2", "float32", True),
        ("zero3", "float32", False),
        ("zero3", "bfloat16", True),
        ("fsdp", "float32", False),
    ],
)
def test_a_step_with_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    tiny_recipe: dict[str, Any], name: str, dtype: str, offload: bool
) -> None:
    tiny_recipe["model"]["dtype"] = dtype
    tiny_recipe["distributed"] = {"strategy": name, "cpu_offload": offload}
    seen = run_processes(2, all_runs, tiny_recipe, name)
    for once, twice, spoilt_between, spoilt_first, spoilt, restored in seen:
        for given in (spoilt_between[0][1], spoilt[0][0], spoilt_first[0][0]):
            assert given in ("norm nan", "norm inf"), "also where the gradient was finite"
        assert spoilt_between[0][::2] == twice[0]
        assert spoilt_first[0][1:] == once[0]
        assert_equal(spoilt_between[1], twice[1])
        assert_equal(spoilt_first[1], once[1])
        assert_equal(restored, once)
        for values in spoilt[1]["state"]["state"].values():
            moved = [key for key, value in values.items() if key != MASTER and torch.as_tensor(value).any()]
            assert not moved, "no moment and no count has moved"
    start = tiny_llama().to(getattr(torch, dtype)).state_dict()
    untouched = seen[0][4][1]["weights"]
    assert untouched
    assert_equal(untouched, {key: start[key] for key in untouched})


def assert_equal(ours: Any, theirs: Any) -> None:
    """To the bit, through all containers."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_equal(ours[key], value)
    else:
        assert ours == theirs
