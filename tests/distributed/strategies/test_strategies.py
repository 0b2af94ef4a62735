"""Parts of a state make the whole again, and sums over ranks are sums, whatever is in one bucket."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import make_strategy
from grpo_cli.distributed.strategies.base import (
    MASTER,
    GradientNotFinite,
    checked_norm,
    joined_state,
    part_of_state,
    without_master,
)
from grpo_cli.distributed.strategies.replicated import Replicated, sum_over_ranks
from grpo_cli.errors import RunError
from grpo_cli.policy.load import load_policy
from grpo_cli.recipe import limits
from grpo_cli.recipe.schema import Recipe
from grpo_cli.train.optim import build_optimizer
from tests.conftest import tiny_llama
from tests.processes import run_processes


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that has made two steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


# The optimizer's state


@given(st.sets(st.integers(0, 20)), st.integers(1, 5), st.randoms())
def test_the_parts_of_all_ranks_make_the_whole_state(indices: set[int], world_size: int, random: Any) -> None:
    state = {
        "state": {index: {"step": index, "exp_avg": 10 * index} for index in sorted(indices)},
        "param_groups": [{"lr": 0.1, "params": sorted(indices)}],
    }
    before = copy.deepcopy(state)
    parts = [part_of_state(state, rank, world_size) for rank in range(world_size)]
    assert sum(len(part["state"]) for part in parts) == len(indices), "no state is kept twice"
    sizes = [len(part_of_state({"state": dict.fromkeys(range(12)), "param_groups": []}, rank, world_size)["state"])
             for rank in range(world_size)]  # fmt: skip
    assert max(sizes) - min(sizes) <= 1
    random.shuffle(parts)
    whole = joined_state(parts)
    assert whole == before
    assert list(whole["state"]) == sorted(indices)
    assert state == before


def test_a_state_that_was_cut_and_joined_loads_into_another_optimizer() -> None:
    model, optimizer = trained()
    parts = [part_of_state(optimizer.state_dict(), rank, 3) for rank in range(3)]
    other = torch.optim.AdamW(copy.deepcopy(model).parameters(), lr=0.7)
    other.load_state_dict(joined_state(parts))
    assert other.param_groups[0]["lr"] == 0.1
    for ours, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_originals_are_left_out_and_everything_else_stays() -> None:
    state = {"state": {0: {"step": 1, MASTER: 2.0}, 4: {"exp_avg": 3}}, "param_groups": [{"lr": 0.1}]}
    before = copy.deepcopy(state)
    kept = without_master(state)
    assert kept == {"state": {0: {"step": 1}, 4: {"exp_avg": 3}}, "param_groups": [{"lr": 0.1}]}
    assert state == before


# Norms


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)], ids=str)
def test_a_norm_that_is_not_finite_is_an_error(norm: Any) -> None:
    with pytest.raises(GradientNotFinite, match=r"^norm (nan|-?inf)$") as caught:
        checked_norm(norm)
    assert isinstance(caught.value, RunError)


def test_a_finite_norm_is_a_float() -> None:
    norm = checked_norm(torch.tensor(2.5))
    assert (type(norm), norm) == (float, 2.5)


# What fails while the model is whole


def parts_after_a_failure(recipe: dict[str, Any]) -> list[bool]:
    """Whether each parameter is shared out again after something failed while the model was whole."""
    ranks = Ranks.join(needs_group=True)
    spread, model = make_strategy("fsdp", Recipe.model_validate(recipe), ranks), tiny_llama()
    spread.prepare(model, torch.optim.AdamW(model.parameters()))
    with contextlib.suppress(RuntimeError), spread.whole_model():
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        raise RuntimeError("generation failed")
    return [isinstance(parameter, DTensor) for parameter in model.parameters()]


@pytest.mark.slow
def test_weights_are_shared_out_again_when_what_needed_them_whole_fails(tiny_recipe: dict[str, Any]) -> None:
    (shared_out,) = run_processes(1, parts_after_a_failure, tiny_recipe)
    assert all(shared_out)


# Weights that are in parts from the moment that they are read


def groups_and_copy(recipe: dict[str, Any]) -> tuple[list[list[list[int]]], Any]:
    """Whole shapes by the optimizer's group, and what the strategy gives as a copy."""
    ranks, settings = Ranks.join(needs_group=True), Recipe.model_validate(recipe)
    spread = make_strategy("zero3", settings, ranks)
    model = load_policy(settings.model, loading=spread.loading)
    spread.take(model)
    optimizer = build_optimizer(model, settings.optim, spread.whole_shape)
    shapes = [[list(spread.whole_shape(p)) for p in group["params"]] for group in optimizer.param_groups]
    return shapes, spread.copied(model)


@pytest.mark.slow
def test_under_zero3_a_matrix_is_decayed_as_one_and_no_copy_of_parts_is_made(tiny_recipe: dict[str, Any]) -> None:
    ((matrices, others), copied) = run_processes(1, groups_and_copy, tiny_recipe)[0]
    whole = [list(parameter.shape) for parameter in tiny_llama().parameters()]
    assert matrices == [shape for shape in whole if len(shape) >= 2]
    assert others == [shape for shape in whole if len(shape) < 2]
    assert copied is None


# One process


@pytest.mark.parametrize("name", ["none", "ddp"])
def test_whole_models_are_replicated(tiny_recipe: dict[str, Any], name: str) -> None:
    strategy = make_strategy(name, Recipe.model_validate(tiny_recipe), Ranks())
    assert isinstance(strategy, Replicated)
    assert not strategy.runs_alike
    assert not strategy.shards_weights


def test_a_step_clips_the_gradient_and_gives_its_norm_from_before() -> None:
    model, optimizer = trained()
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    strategy = Replicated(Ranks(), 0.5)
    strategy.prepare(model, optimizer)
    strategy.zero_grad()
    for part in (2.0, 3.0):
        strategy.backward(model(torch.full((1, 3), part)).sum())
    norm = strategy.step()

    twin.zero_grad()
    (twin(torch.full((1, 3), 2.0)).sum() + twin(torch.full((1, 3), 3.0)).sum()).backward()
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    other.step()
    assert norm == pytest.approx(expected.item())
    assert norm > 0.5
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_parameter_that_nothing_reached_goes_on_with_its_momentum_and_a_frozen_one_stays() -> None:
    model, optimizer = trained()
    first, second = model[0], model[1]  # type: ignore[index]
    first.bias.requires_grad_(False)
    strategy = Replicated(Ranks(), 1.0)
    strategy.prepare(model, optimizer)
    strategy.zero_grad()
    strategy.backward(second(torch.ones(1, 4)).sum())
    before = [value.detach().clone() for value in (first.weight, first.bias)]
    strategy.step()
    assert not torch.equal(first.weight, before[0])
    assert torch.equal(first.bias, before[1])


def test_a_gradient_that_is_not_finite_leaves_the_policy_as_it_was() -> None:
    model, optimizer = trained()
    strategy = Replicated(Ranks(), 1.0)
    strategy.prepare(model, optimizer)
    strategy.zero_grad()
    strategy.backward(model(torch.full((1, 3), math.inf)).sum())
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(GradientNotFinite):
        strategy.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert str(optimizer.state_dict()) == str(state)


# Two processes


def tensors_of(rank: int) -> list[torch.Tensor]:
    """Of several dtypes, shapes and layouts; small whole numbers, whose sums are exact in each of them."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3, 5), (), (40,), (2, 3, 4), (0,), (1,), (64, 2), (7,), (5, 5)]
    dtypes = [torch.float32] * 3 + [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.float64, torch.bfloat16]
    made = [
        torch.randint(-9, 10, shape, generator=generator).to(d) for shape, d in zip(shapes, dtypes, strict=True)
    ]
    return [*made, torch.randint(-9, 10, (6, 4), generator=generator).float().T]


def two_ranks() -> dict[str, Any]:
    ranks = Ranks.join(needs_group=False)
    seen: dict[str, Any] = {"sums": {}}
    for limit in (1, 50, 200, 10_000):
        limits.GRADIENT_BUCKET_BYTES = limit
        tensors = tensors_of(ranks.rank)
        sum_over_ranks(tensors)
        seen["sums"][limit] = tensors
    thirds = [torch.full((100,), 1 / 3 + ranks.rank / 7)]
    sum_over_ranks(thirds)
    seen["bits"] = thirds[0]

    model, optimizer = trained()
    strategy = Replicated(ranks, 100.0)
    strategy.prepare(model, optimizer)
    strategy.zero_grad()
    if ranks.rank == 0:  # the other has no pack at all
        strategy.backward(model(torch.ones(1, 3)).sum())
    seen["norm"] = strategy.step()
    seen["weights"] = {name: value.detach() for name, value in model.state_dict().items()}
    seen["part"] = strategy.optimizer_state()
    strategy.zero_grad()
    strategy.backward(model(torch.ones(1, 3)).sum() * (math.nan if ranks.rank else 1.0))
    try:
        strategy.step()
    except GradientNotFinite as error:
        seen["error"] = str(error)
    return seen


@pytest.mark.slow
def test_two_ranks_step_alike_on_the_sum_of_their_gradients() -> None:
    seen = run_processes(2, two_ranks)
    sums = [one + other for one, other in zip(tensors_of(0), tensors_of(1), strict=True)]
    for one in seen:
        for limit, tensors in one["sums"].items():
            for actual, expected in zip(tensors, sums, strict=True):
                assert actual.dtype == expected.dtype
                assert torch.equal(actual, expected), f"buckets of {limit} bytes"
    assert torch.equal(seen[0]["bits"], seen[1]["bits"])

    model, optimizer = trained()
    alone = Replicated(Ranks(), 100.0)
    alone.prepare(model, optimizer)
    alone.zero_grad()
    alone.backward(model(torch.ones(1, 3)).sum())
    norm = alone.step()
    for one in seen:
        assert one["norm"] == norm
        assert one["error"] == "norm nan", "also where the gradient was finite"
        assert all(torch.equal(one["weights"][name], value) for name, value in model.state_dict().items())
    assert [list(one["part"]["state"]) for one in seen] == [[0, 2], [1, 3]]
    joined = joined_state([one["part"] for one in seen])
    assert str(joined) == str(alone.optimizer_state())
