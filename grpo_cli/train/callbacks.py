"""User code that watches a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_cli.errors import EXPECTED_ERRORS, RunError, UserError
from grpo_cli.plugins import load_object, origin
from grpo_cli.recipe.schema import Recipe

EVENTS = ("on_train_start", "on_step_end", "on_evaluate", "on_checkpoint", "on_train_end")


@dataclass
class TrainState:
    """What a callback sees. It may set `stop` to end the run after the current step."""

    recipe: Recipe
    model: Any
    """The policy, a transformers model (or its PEFT wrapper)."""
    tokenizer: Any
    output_dir: Path
    max_steps: int
    step: int = 0
    """Steps done."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last step."""
    stop: bool = False


class Callback:
    """Base of callbacks: override what you need. An exception in one ends the run, but for `on_train_end`."""

    def on_train_start(self, state: TrainState) -> None:
        """Before the first step of this process, resumed or not."""

    def on_step_end(self, state: TrainState) -> None:
        """After the optimizer steps of a step and before its evaluation; `state.metrics` is logged after both, so
        what is added to it is logged."""

    def on_evaluate(self, state: TrainState) -> None:
        """After an evaluation; `state.metrics` holds the `eval_…` metrics."""

    def on_checkpoint(self, state: TrainState) -> None:
        """After a checkpoint was written."""

    def on_train_end(self, state: TrainState) -> None:
        """After the last step, before the final model is written, whatever happens here: an exception is told."""


def load_callbacks(paths: Sequence[str]) -> list[Any]:
    """The recipe's `train.callbacks`: classes are instantiated, objects are taken as they are.

    Raises:
        UserError: one is not there, cannot be made, or has none of the callback's methods.
    """
    callbacks = []
    for index, path in enumerate(paths):
        setting = f"train.callbacks.{index}"
        target = load_object(path, setting=setting)
        if isinstance(target, type):
            try:
                target = target()
            except Exception as error:
                raise UserError(f"{setting}: {path}() failed: {origin(error, below=__file__)}") from error
        callbacks.append(check_callback(target, setting))
    return callbacks


def check_callback(callback: Any, setting: str) -> Any:
    """Return `callback` if it answers at least one event."""
    if not any(callable(getattr(callback, event, None)) for event in EVENTS):
        raise UserError(f"{setting}: {callback!r} has none of the methods {', '.join(EVENTS)}")
    return callback


def notify(callbacks: Sequence[Any], event: str, state: TrainState) -> None:
    """Call `event` on every callback that has it.

    Raises:
        RunError: a callback raised, or left something in `state.metrics` that is not a number.
    """
    for callback in callbacks:
        method = getattr(callback, event, None)
        if not callable(method):
            continue
        where = f"callback {type(callback).__name__}.{event}, step {state.step}"
        try:
            method(state)
        except EXPECTED_ERRORS:
            raise
        except Exception as error:
            raise RunError(f"{where}: {origin(error, below=__file__)}") from error
        state.metrics = {
            name: _number(value, f"{where}: metrics[{name!r}]") for name, value in state.metrics.items()
        }


def _number(value: Any, where: str) -> float:
    """A metric as it can be logged: tensors and NumPy scalars of one element become plain numbers."""
    if isinstance(value, int | float):
        return value
    if not isinstance(value, str) and hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"{where} is not one number: {error}") from error
    raise RunError(f"{where} is of type {type(value).__name__}; only numbers can be logged")
