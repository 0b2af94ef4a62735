"""What reward functions are given beside their data, as TRL gives it: where the run stands, and two ways to log.

What a call logs is kept by itself until the call has succeeded: calls run on several threads, processes and ranks,
fail, and go on after their time. No torch import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from grpo_cli.recipe.schema import Recipe
from grpo_cli.record.metrics import Metrics, is_own_metric
from grpo_cli.reward.values import Unusable, as_many, is_real, shortened

LARGEST_INTEGER = 2**63
"""Integers from here on are logged as text."""

Plain = bool | int | float | str | None
"""What `log_extra` keeps of a value; anything else becomes JSON text."""


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, under the names of `transformers.TrainerState`. It cannot be changed."""

    global_step: int = 0
    """Steps done: 0 in the first rollout."""
    max_steps: int = 0
    """Of the run."""
    epoch: float = 0.0
    """Passes over the prompts that the steps done have made."""
    num_train_epochs: int = 0
    """Passes over the prompts in the whole run, the last one begun counted."""
    logging_steps: int = 1
    """The recipe's `logging.every`."""
    num_input_tokens_seen: int = 0
    """Prompt and completion tokens of the steps done."""
    is_local_process_zero: bool = True
    """Whether this process is the first on its machine."""
    is_world_process_zero: bool = True
    """Whether this process is the first of all."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state has no {name} here; it has {', '.join(vars(self))}")


NO_RUN = TrainerState()
"""Where nothing is said of a run."""


def state_of_run(recipe: Recipe, num_prompts: int, step: int = 0) -> TrainerState:
    """Where a run over so many prompts stands after `step` steps, but for its tokens and processes."""
    max_steps, per_step = recipe.train.number_of_steps(num_prompts), recipe.train.prompts_per_step
    return TrainerState(
        global_step=step,
        max_steps=max_steps,
        epoch=step * per_step / num_prompts,
        num_train_epochs=math.ceil(max_steps * per_step / num_prompts),
        logging_steps=recipe.logging.every,
    )


class CallLog:
    """Takes what one call of a reward function logs; its methods are what the function is given.

    Args:
        count: completions in the call.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.extras: dict[str, list[Plain]] = {}
        self.metrics: list[tuple[str, float]] = []

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Add a column to the completions that the run stores; the last call for a column counts.

        Raises:
            Unusable: the name is no text, or the values are not a list with one for each completion.
        """
        if not isinstance(column, str) or not column:
            raise Unusable(f"log_extra: {shortened(column)} is no name of a column")
        listed = values.tolist() if hasattr(values, "tolist") else values
        if isinstance(listed, str | bytes | bytearray | Mapping | Set) or not isinstance(listed, Iterable):
            raise Unusable(f"log_extra of {column!r} was given a {type(values).__name__} instead of a list")
        counted = as_many(listed, self._count, f"log_extra of {column!r} was given")
        self.extras[as_text(column)] = [_plain(value) for value in counted]

    def log_metric(self, name: str, value: float) -> None:
        """Add a number to the metrics of the step: the mean over the completions of all calls that log the name.

        Raises:
            Unusable: the name is no text or the run's own, or the value is no number.
        """
        if not isinstance(name, str) or not name:
            raise Unusable(f"log_metric: {shortened(name)} is no name of a metric")
        if is_own_metric(name):
            raise Unusable(f"log_metric: {name!r} is a metric of the run's own; log it under another name")
        if not is_real(value):
            raise Unusable(f"log_metric of {name!r} was given {shortened(value)}, which is not a number")
        self.metrics.append((as_text(name), float(value)))

    def taken(self, function: str) -> Logged:
        """What a call of this function has logged until now."""
        return Logged(function, range(self._count), dict(self.extras), list(self.metrics))


@dataclass(frozen=True)
class Logged:
    """What a call of a reward function has logged."""

    function: str
    places: Sequence[int]
    """Of the call's completions among all."""
    extras: dict[str, list[Plain]]
    """By column, a value for each of them."""
    metrics: list[tuple[str, float]]

    def at(self, places: Sequence[int]) -> Logged:
        """The same where what was completion i is completion `places[i]`."""
        return replace(self, places=[places[place] for place in self.places])


def extra_columns(logged: Iterable[Logged], names: Sequence[str], count: int) -> dict[str, list[Plain]]:
    """The columns that functions have logged; of several that logged one, the last has the word, as in TRL.

    Args:
        logged: by calls of any functions, in any order.
        names: of the functions, in the order of the recipe.
        count: N completions.

    Returns:
        By name N values, None where nothing was logged.
    """
    columns: dict[str, list[Plain]] = {}
    for call in sorted(logged, key=lambda one: names.index(one.function)):
        for name, values in call.extras.items():
            column = columns.setdefault(name, [None] * count)
            for place, value in zip(call.places, values, strict=True):
                column[place] = value
    return dict(sorted(columns.items()))


def logged_metrics(logged: Iterable[Logged]) -> Metrics:
    """The mean of each metric that functions have logged, weighted by the completions of the calls.

    It is exact, so that the order of the calls makes no difference, and NaN where one of the values is not finite.
    """
    values: dict[str, list[tuple[float, int]]] = {}
    for call in logged:
        for name, value in call.metrics:
            values.setdefault(name, []).append((value, len(call.places)))
    return {name: _mean(weighted) for name, weighted in sorted(values.items())}


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    if not all(math.isfinite(value) for value, _ in weighted):
        return math.nan
    total = sum(weight for _, weight in weighted)
    return float(sum(Fraction(value) * weight for value, weight in weighted) / total)


def _plain(value: Any) -> Plain:
    """A value as a column can hold it."""
    if hasattr(value, "dtype") and hasattr(value, "item") and not getattr(value, "shape", ()):
        value = value.item()
    if isinstance(value, int) and not isinstance(value, bool) and not -LARGEST_INTEGER <= value < LARGEST_INTEGER:
        return str(value)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, int | float):
        return float(value)
    return as_text(value)


def as_text(value: Any) -> str:
    """A text as it is, without what UTF-8 cannot hold; anything else as JSON, or as Python writes it where JSON
    cannot hold its keys or its depth."""
    text = value if isinstance(value, str) else _as_json(value)
    return text.encode("utf-8", "replace").decode()


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return str(value)
