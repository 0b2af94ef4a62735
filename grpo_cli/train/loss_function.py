"""The loss that a recipe names: a built-in one, or a user's own function, whose mistakes are told by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grpo_cli.errors import EXPECTED_ERRORS, RunError, UserError
from grpo_cli.plugins import load_object, origin
from grpo_cli.recipe.schema import LossConfig

if TYPE_CHECKING:
    from grpo_cli.algorithm.losses import LossOutput, MeasuredLoss

POSITIONAL = ("logprobs", "old_logprobs", "advantages", "mask", "config")
NAMED = ("normalizer", "ref_logprobs", "sampling_logprobs", "entropies", "importance_ratio")
"""What a user's own function is called with."""


def load_loss_function(path: str) -> Callable[..., Any]:
    """The user's function at `module:function`. Imports no torch itself, since `grpo check` calls it.

    Raises:
        UserError: it is not there, or does not take the arguments that it will be called with.
    """
    function = load_object(path, setting="loss.type")
    if not callable(function) or isinstance(function, type):
        kind = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise UserError(f"loss.type: {path} is {kind}, not a function")
    try:
        inspect.signature(function).bind(*POSITIONAL, **dict.fromkeys(NAMED))
    except TypeError as error:
        called = f"({', '.join(POSITIONAL)}, *, {', '.join(NAMED)})"
        raise UserError(f"loss.type: {path} cannot be called with {called}: {error}") from error
    except ValueError:
        pass  # written in C, without a signature that Python could read
    return function


def resolve_loss(config: LossConfig) -> Callable[..., MeasuredLoss | LossOutput]:
    """The function that the training loop calls as `measured_loss`.

    A user's own function is given the arguments in `NAMED` alone, and is called with a `normalizer` of at least 1
    and at least one completion.

    Raises:
        UserError: as `load_loss_function`. The function returned raises RunError where the user's fails, or
            returns something else than a scalar loss with a gradient.
    """
    import torch

    from grpo_cli.algorithm.losses import LossOutput, measured_loss

    if not config.is_function:
        return measured_loss
    path, function = config.type, load_loss_function(config.type)

    def users_loss(logprobs: torch.Tensor, *inputs: Any, normalizer: float, **given: Any) -> LossOutput:
        if not len(logprobs):  # this rank has run out of completions, but must go backward with the others
            return LossOutput(logprobs.sum())
        named = {name: value for name, value in given.items() if name in NAMED}
        try:
            output = function(logprobs, *inputs, normalizer=max(normalizer, 1.0), **named)
        except (*EXPECTED_ERRORS, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RunError(f"loss.type: {path} failed: {origin(error, below=__file__)}") from error
        return _checked(output, f"loss.type: {path} returned")

    return users_loss


def _checked(output: Any, where: str) -> LossOutput:
    """What a user's function returned, its metrics as plain numbers.

    Raises:
        RunError: it cannot be trained with.
    """
    import torch

    from grpo_cli.algorithm.losses import LossOutput

    if isinstance(output, torch.Tensor):
        output = LossOutput(output)
    if not isinstance(output, LossOutput) or not isinstance(output.loss, torch.Tensor):
        wrong = output.loss if isinstance(output, LossOutput) else output
        raise RunError(f"{where} a {type(wrong).__name__}; return a LossOutput or a tensor with one number")
    if output.loss.dim():
        raise RunError(f"{where} a loss of shape {tuple(output.loss.shape)}; add it up to one number, of shape ()")
    if not output.loss.requires_grad:
        raise RunError(f"{where} a loss without a gradient; compute it from logprobs, which are not detached")
    try:
        metrics = {name: float(value) for name, value in output.metrics.items()}
        weights = {name: float(value) for name, value in output.weights.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{where} metrics or weights that are no names with numbers: {error}") from error
    if unmeasured := sorted(weights.keys() - metrics.keys()):
        raise RunError(f"{where} weights of metrics that it did not return: {', '.join(unmeasured)}")
    return LossOutput(output.loss, metrics, weights)
