"""The optimizer and the learning-rate schedule of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import get_scheduler

from grpo_cli.errors import UserError
from grpo_cli.plugins import load_object, origin
from grpo_cli.recipe.schema import OptimConfig


def build_optimizer(
    model: torch.nn.Module, config: OptimConfig, whole_shape: Callable[[torch.Tensor], torch.Size]
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, or what the recipe's factory makes of them.

    Args:
        model: whose weights may be in parts.
        config: the recipe's `optim` section.
        whole_shape: see `Strategy.whole_shape`; weights are decayed where it has two dimensions or more.

    Raises:
        UserError: the factory is not there, refuses its arguments, or does not return an optimizer.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.name == "adamw":
        matrices = [parameter for parameter in trainable if len(whole_shape(parameter)) >= 2]
        others = [parameter for parameter in trainable if len(whole_shape(parameter)) < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
    factory = load_object(config.name, setting="optim.name")
    try:
        optimizer = factory(trainable, lr=config.learning_rate, **config.params)
    except Exception as error:
        raise UserError(f"optim.params: {config.name} failed: {origin(error, below=__file__)}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optim.name: {config.name} returned a {type(optimizer).__name__}, not a torch optimizer")
    return optimizer


def check_coverage(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError if a trainable parameter is in no group of the optimizer: it would never be updated."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left_out:
        raise UserError(
            f"the optimizer leaves out {len(left_out)} trainable parameters ({', '.join(left_out[:3])}, ...); "
            "give it all of them, or set requires_grad to False where they shall not be trained"
        )


def build_scheduler(optimizer: Any, config: OptimConfig, num_optimizer_steps: int) -> Any:
    """The recipe's schedule over all optimizer steps of the run."""
    # transformers' own end of a polynomial, 1e-7, may be above a small learning rate.
    polynomial = {"lr_end": min(1e-7, 0.1 * optimizer.defaults["lr"])}
    return get_scheduler(
        config.scheduler,
        optimizer,
        num_warmup_steps=min(round(config.warmup_ratio * num_optimizer_steps), num_optimizer_steps - 1),
        num_training_steps=num_optimizer_steps,
        scheduler_specific_kwargs=polynomial if config.scheduler == "polynomial" else None,
    )


def restore_schedule(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Go on where a saved schedule stood, at this schedule's rates: it may be a longer one by now.

    What torch restores of a schedule and of its optimizer are the rates of the old one until the next step.
    """
    scheduler.load_state_dict(dict(state))
    factors = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [base * factor(scheduler.last_epoch) for base, factor in factors]
    scheduler.load_state_dict(scheduler.state_dict() | {"_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
