"""The optimizer holds what is trained, and the schedule ends where the run does."""

from __future__ import annotations

import math
import sys
import types
from typing import Any, get_args

import pytest
import torch

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import OptimConfig, Scheduler
from grpo_cli.train.optim import build_optimizer, build_scheduler


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.norm = torch.nn.LayerNorm(2)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of optimizer factories, importable as `my_optimizers`."""
    module = types.ModuleType("my_optimizers")
    monkeypatch.setitem(sys.modules, "my_optimizers", module)
    return module


def learning_rates(config: OptimConfig, steps: int) -> list[float]:
    optimizer = build_optimizer(Small(), config, torch.Tensor.size)
    scheduler = build_scheduler(optimizer, config, steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_adamw_holds_every_trainable_parameter_once_and_decays_matrices_only() -> None:
    model = Small()
    config = OptimConfig(learning_rate=0.01, weight_decay=0.3, betas=(0.8, 0.95))
    optimizer = build_optimizer(model, config, torch.Tensor.size)
    assert isinstance(optimizer, torch.optim.AdamW)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(held) == len(wanted)
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in wanted}
    for group in optimizer.param_groups:
        assert group["lr"] == 0.01
        assert group["betas"] == (0.8, 0.95)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.dim() >= 2 else 0.0)


def test_a_model_of_matrices_alone_has_no_empty_group() -> None:
    optimizer = build_optimizer(torch.nn.Linear(2, 2, bias=False), OptimConfig(), torch.Tensor.size)
    assert len(optimizer.param_groups) == 1


def test_a_step_is_that_of_adamw() -> None:
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}], lr=0.1, weight_decay=0.2
    )
    optimizer = build_optimizer(ours, OptimConfig(learning_rate=0.1, weight_decay=0.2), torch.Tensor.size)
    for _ in range(3):
        for model, stepper in ((ours, optimizer), (theirs, reference)):
            stepper.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            stepper.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_a_factory_gets_the_parameters_the_rate_and_its_params(factories: types.ModuleType) -> None:
    factories.sgd = torch.optim.SGD  # type: ignore[attr-defined]
    model = Small()
    config = OptimConfig(name="my_optimizers:sgd", learning_rate=0.5, params={"momentum": 0.9})
    optimizer = build_optimizer(model, config, torch.Tensor.size)
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)
    assert len(group["params"]) == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_factory_that_cannot_be_used_is_one_message(factories: types.ModuleType) -> None:
    factories.sgd = torch.optim.SGD  # type: ignore[attr-defined]
    factories.number = lambda parameters, lr: 3  # type: ignore[attr-defined]
    for settings, message in (
        ({"name": "my_optimizers:sgd", "params": {"speed": 1}}, r"optim\.params: my_optimizers:sgd .*speed"),
        ({"name": "my_optimizers:sgd", "params": {"momentum": -1.0}}, r"optim\.params: .*momentum"),
        ({"name": "my_optimizers:number"}, r"optim\.name: my_optimizers:number returned a int"),
        ({"name": "my_optimizers:adan"}, r"optim\.name: .*adan"),
        ({"name": "no_such_module:x"}, r"optim\.name: .*no_such_module"),
    ):
        with pytest.raises(UserError, match=message):
            build_optimizer(Small(), OptimConfig(**settings), torch.Tensor.size)  # type: ignore[arg-type]


def test_a_linear_schedule_warms_up_and_reaches_zero_after_the_last_step() -> None:
    rates = learning_rates(OptimConfig(learning_rate=1.0, warmup_ratio=0.2), 10)
    assert rates[:3] == pytest.approx([0, 0.5, 1])
    assert rates[9] == pytest.approx(1 / 8)
    assert rates[10] == 0


def test_a_constant_schedule_is_constant() -> None:
    assert set(learning_rates(OptimConfig(learning_rate=0.3, scheduler="constant"), 5)) == {0.3}


@pytest.mark.parametrize("scheduler", get_args(Scheduler))
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("learning_rate", [1.0, 1e-8])
def test_every_schedule_of_the_recipe_starts_and_stays_within_the_peak(
    scheduler: Any, warmup_ratio: float, learning_rate: float
) -> None:
    config = OptimConfig(learning_rate=learning_rate, scheduler=scheduler, warmup_ratio=warmup_ratio)
    for steps in (1, 7):
        rates = learning_rates(config, steps)
        assert all(0 <= rate <= learning_rate * (1 + 1e-9) for rate in rates)
        assert all(math.isfinite(rate) for rate in rates)
        if warmup_ratio == 0:
            assert rates[0] == pytest.approx(learning_rate)
