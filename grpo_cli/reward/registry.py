"""Finds the reward functions that a recipe names.

Everything that can be known about a reward function before its first call is checked here: that it exists,
that it can be called by keyword, that it takes its `params`. `grpo check` uses this module, so it must never
import torch; a reward model imports it only when it is loaded.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from grpo_cli.errors import UserError
from grpo_cli.plugins import load_object
from grpo_cli.recipe.schema import REWARD_ARGUMENTS, RewardConfig
from grpo_cli.reward.isolated import IsolatedFunction, memory_for
from grpo_cli.reward.reward_model import RewardModel

ENTRY_POINT_GROUP = "grpo_cli.rewards"

ENVIRONMENTS = "environments"
"""What a reward function may ask for where episodes have environments: the object of each completion's episode."""


@dataclass(frozen=True)
class RewardFunction:
    """A reward function that is ready to be called."""

    name: str
    """Name in metrics and messages."""
    weight: float
    """Factor in the weighted sum."""
    call: Callable[..., Any]
    """`call(**kwargs)` returns a list, or an awaitable of one."""
    timeout_s: float | None
    """Longest time for one call."""
    on_error: Literal["raise", "none"]
    """What a failing call does: end the run, or leave its completions without this score."""
    workers: int
    """Threads that score finished groups in training; 0 for one call with all completions."""
    accepts: frozenset[str] | None
    """Names of the keyword arguments it takes; None when it has **kwargs."""
    required: frozenset[str]
    """Names of the keyword arguments without a default."""
    asks_for_environments: bool = False
    """It has a parameter `environments`."""

    @property
    def shares_work(self) -> bool:
        """Whether a call may hold some groups only, so that processes divide them among themselves.

        An environment lives in the process that played its episode, so its groups are scored there.
        """
        scores_each_alone = getattr(self.call, "scores_each_alone", False)
        return self.workers > 0 or self.asks_for_environments or scores_each_alone


class BoundFunction(functools.partial[Any]):
    """A function with its `params`, which win over a dataset column of the same name."""

    def __call__(self, /, **arguments: Any) -> Any:
        return self.func(*self.args, **{**arguments, **self.keywords})


def resolve_rewards(configs: Sequence[RewardConfig], *, load_models: bool = True) -> list[RewardFunction]:
    """Find every reward function of a recipe, in its order.

    Models are loaded after the functions, so that a misspelt path is not reported after a long download.

    Args:
        configs: the recipe's `rewards`.
        load_models: load reward models; if False, only their `params` are checked and they are left out.

    Raises:
        UserError: a path or short name does not exist, cannot be called, or does not take its `params`, or a
            model cannot be loaded. The message has a line for each of them.
    """
    resolved: dict[int, RewardFunction] = {}
    problems: list[UserError] = []
    for index in sorted(range(len(configs)), key=lambda i: configs[i].model is not None):
        config, setting = configs[index], f"rewards.{index}"
        try:
            if config.model is None:
                resolved[index] = _isolated(config, setting) if config.isolate else resolve_reward(config, setting)
            else:
                _refuse_unknown_params(config.params, _model_params(), f"{setting}: {config.model}")
                if problems or not load_models:
                    continue
                resolved[index] = _described(_load_model(config.model, config.params, setting), config, setting)
        except UserError as error:
            problems.append(error)
    if problems:
        raise UserError("\n".join(map(str, problems))) from problems[0]
    return [resolved[index] for index in sorted(resolved)]


def resolve_reward(config: RewardConfig, setting: str) -> RewardFunction:
    """Find one reward function that is no model, to be called in this process.

    Raises:
        UserError: its path or short name does not exist, cannot be called, or does not take its `params`.
    """
    target = _find(config.path or "", setting)
    return _described(_with_params(target, config.params, f"{setting}: {config.path}"), config, setting)


def reward_from_callable(
    function: Callable[..., Any], *, name: str | None = None, weight: float = 1.0
) -> RewardFunction:
    """A reward function from a Python object: a function, or an instance or class with `__call__`.

    Args:
        function: what to call; a class is instantiated without arguments.
        name: name in metrics and messages; the function's own if empty.
        weight: factor in the weighted sum.

    Raises:
        UserError: it cannot be called, or not by keyword, or the weight is not a finite number.
    """
    shown = name or _own_name(function)
    if not math.isfinite(weight):
        raise UserError(f"rewards: the weight of {shown} is {weight}, not a finite number")
    call = _with_params(function, {}, f"rewards: {shown}")
    return _described(call, RewardConfig(name=shown, weight=float(weight)), "rewards")


def check_columns(
    functions: Sequence[RewardFunction], columns: Sequence[str], setting: str, *, has_environments: bool = False
) -> None:
    """Check that the functions can be given what they require.

    Args:
        functions: the reward functions.
        columns: the dataset's, without the prompt column.
        setting: `data` or `data.eval`, for the message.
        has_environments: episodes have environments.

    Raises:
        UserError: a required argument is no column, or a function cannot be given the environments.
    """
    if has_environments and ENVIRONMENTS in columns:
        raise UserError(
            f"{setting}.columns: reward functions get an argument {ENVIRONMENTS}, so no column can have that "
            f"name; rename it with {setting}.columns: {{{ENVIRONMENTS}: {ENVIRONMENTS}_in_data}}"
        )
    for function in functions:
        if has_environments and function.asks_for_environments and isinstance(function.call, IsolatedFunction):
            raise UserError(
                f"reward {function.name} asks for {ENVIRONMENTS}, which are not in the process of its own that "
                "isolate gives it; remove isolate, or the argument"
            )
        given = (*REWARD_ARGUMENTS, *columns, *([ENVIRONMENTS] if has_environments else []))
        missing = sorted(function.required.difference(given))
        if ENVIRONMENTS in missing:
            raise UserError(
                f"reward {function.name} asks for {ENVIRONMENTS}, and there are none; add episode.environment, or "
                "give the argument a default"
            )
        if missing:
            raise UserError(
                f"reward {function.name} needs the column {', '.join(missing)}, which {setting} does not have "
                f"(it has: {', '.join(columns) or 'none beside the prompt'}); rename one with "
                f"{setting}.columns, or give the argument a default"
            )


def is_async(call: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine: `async def`, an async `__call__`, or a partial of one of them."""
    target: Any = call
    while isinstance(target, functools.partial):
        target = target.func
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(target.__call__)


def _find(path: str, setting: str) -> Any:
    """The object that `module:name` or an installed short name stands for."""
    if ":" in path:
        return load_object(path, setting=setting)
    installed: dict[str, set[str]] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        installed.setdefault(entry.name, set()).add(f"{entry.module}:{entry.attr}")
    if path not in installed:
        near = difflib.get_close_matches(path, installed, n=1)
        module, _, name = path.rpartition(".")
        suggestion = near[0] if near else f"{module}:{name}" if module else ""
        hint = f"did you mean {suggestion}? " if suggestion else ""
        raise UserError(
            f"{setting}: there is no installed reward function {path!r}; {hint}"
            f"Installed: {', '.join(sorted(installed)) or 'none'}. For your own, write module:function"
        )
    objects = sorted(installed[path])
    if len(objects) > 1:
        raise UserError(f"{setting}: {path!r} is ambiguous; write one of {', '.join(objects)}")
    return load_object(objects[0], setting=setting)


def _with_params(target: Any, params: Mapping[str, Any], where: str) -> Callable[..., Any]:
    """What to call: the instance of a class, or the function with its `params`. Errors begin with `where`.

    A function may have an attribute `check_params`, which is called with the `params` and raises ValueError.
    """
    if inspect.isclass(target):
        _refuse_unknown_params(params, _keywords(target), where)
        try:
            target = target(**params)
        except Exception as error:
            raise UserError(f"{where} cannot be made: {type(error).__name__}: {error}") from error
        if not callable(target):
            raise UserError(f"{where} is a class without __call__, so its instance cannot score anything")
        return target
    if not callable(target):
        raise UserError(f"{where} is of type {type(target).__name__}, not something to call")
    checked = target if not params else _bound(target, params, where)
    check_params = getattr(target, "check_params", None)
    if callable(check_params):
        try:
            check_params(**params)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {error}") from error
    return checked


def _bound(target: Callable[..., Any], params: Mapping[str, Any], where: str) -> BoundFunction:
    """A function with its `params`. Errors begin with `where`."""
    if not (inspect.isroutine(target) or isinstance(target, functools.partial) or hasattr(target, "__wrapped__")):
        raise UserError(
            f"{where} is an object that exists already, so params cannot reach it; "
            f"remove params, or name its class {type(target).__name__} instead"
        )
    reserved = sorted(set(params).intersection(REWARD_ARGUMENTS))
    if reserved:
        raise UserError(f"{where}: {', '.join(reserved)} cannot be in params: every call is given its own")
    _refuse_unknown_params(params, _keywords(target), where)
    return BoundFunction(target, **params)


def _isolated(config: RewardConfig, setting: str) -> RewardFunction:
    """A reward function that is found, made and called in a process of its own."""
    call = IsolatedFunction(
        config.path or "",
        config.params,
        timeout_s=config.timeout_s,
        memory_bytes=memory_for(config.workers),
        setting=setting,
    )
    return RewardFunction(
        config.metric_name,
        config.weight,
        call,
        config.timeout_s,
        config.on_error,
        config.workers,
        # The process counts the completions, and gives the function what it takes.
        None if call.accepts is None else call.accepts | {"completions"},
        call.required,
        ENVIRONMENTS in call.required.union(call.accepts or ()),
    )


def _load_model(model: str, params: Mapping[str, Any], setting: str) -> RewardModel:
    """Load a reward model; errors start with the setting."""
    try:
        return RewardModel(model, **params)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error


def _described(call: Callable[..., Any], config: RewardConfig, setting: str) -> RewardFunction:
    """What the recipe says about a function, and what its signature says that it accepts and requires."""
    name, accepts = config.metric_name, _keywords(call)
    if accepts is not None and isinstance(call, BoundFunction):
        accepts = accepts.difference(call.keywords)
    needed = [p for p in _parameters(call) or [] if p.default is p.empty]
    positional = [p.name for p in needed if p.kind is p.POSITIONAL_ONLY]
    if positional:
        raise UserError(
            f"{setting}: {name} takes {', '.join(positional)} by position only, but reward functions are "
            "called with keyword arguments: prompts, completions, completion_ids and the dataset's columns"
        )
    required = frozenset(p.name for p in needed if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    # With **kwargs too, it has to name them: what it is called with then depends on how many processes there are.
    asks = any(p.name == ENVIRONMENTS for p in _parameters(call) or [])
    if isinstance(call, BoundFunction) and ENVIRONMENTS in call.keywords:
        asks = False
    return RewardFunction(
        name, config.weight, call, config.timeout_s, config.on_error, config.workers, accepts, required, asks
    )


def _parameters(target: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """The parameters of a call, or None where Python does not know them (some built-in functions)."""
    try:
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None


def _keywords(target: Callable[..., Any]) -> frozenset[str] | None:
    """Names that can be passed by keyword, or None when any can."""
    parameters = _parameters(target)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def _model_params() -> frozenset[str]:
    return (_keywords(RewardModel) or frozenset()) - {"name"}


def _refuse_unknown_params(params: Mapping[str, Any], taken: frozenset[str] | None, where: str) -> None:
    """Raise UserError naming the `params` that are not taken, and those that are."""
    if taken is None:
        return
    unknown = [name for name in params if name not in taken]
    if unknown:
        choices = ", ".join(sorted(taken.difference(REWARD_ARGUMENTS))) or "nothing"
        raise UserError(f"{where} does not take {', '.join(unknown)}; params can be: {choices}")


def _own_name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", None) or type(function).__name__)
