"""Tools and environments: found, looked at once, and kept for the length of a run.

An environment is an object of a class like TRL's: `reset(**columns)` begins an episode and may return text for
the prompt, every other public method is a tool, `get_reward()` scores what happened. Ours may also have
`respond(text)`, which answers a turn that calls no tool, and `close()`.

No torch import: `grpo check` makes environments too. Those of a run are kept in `pool.py`.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_cli.episode.tools import Tool, by_name, tool_of
from grpo_cli.errors import UserError
from grpo_cli.plugins import load_object, origin
from grpo_cli.recipe.episode import EpisodeConfig
from grpo_cli.reward.registry import RewardFunction, reward_from_callable

NO_TOOLS = ("reset", "get_reward", "respond", "close")
"""Public methods of an environment that the policy cannot call."""

SEED = "seed"
"""What `reset` may ask for beside the columns."""

COLUMN = "environment"
"""The column that names a row's environment, where there are several."""


@dataclass(frozen=True)
class EnvironmentKind:
    """What is known about an environment before its first episode."""

    name: str | None
    """Under which rows ask for it; None if it is the only one."""
    make: Callable[[], Any]
    """Makes an object of it."""
    tools: list[Tool]
    """Its public methods, unbound: `getattr(instance, tool.name)` is what to call."""
    takes_seed: bool
    """`reset` has a parameter `seed`."""
    responds: bool
    """It has `respond`, which answers a turn that calls no tool."""
    has_reward: bool
    """It has `get_reward`."""
    cls: type[Any]
    """The class of its objects."""
    accepts: frozenset[str] | None
    """Names of what `reset` takes; None when it has **kwargs."""
    required: frozenset[str]
    """Names of what `reset` has no default for."""

    @property
    def class_name(self) -> str:
        """Name of its reward in metrics."""
        return self.cls.__name__

    def reset_arguments(self, prompt: Any, columns: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """What to call `reset` with: the row, as in TRL, and the seed.

        Args:
            prompt: messages of the row, given as `prompt`.
            columns: its other columns.
            seed: the same for all members of a group. Given only to a `reset` that has a parameter of this name:
                one with **kwargs may hand them on to a server, which need not know of it. A column of this name
                comes before it.
        """
        row = {"prompt": prompt, **columns}
        if self.name is not None:
            row.pop(COLUMN, None)  # in TRL too it says where the row goes, and is no part of it
        if self.takes_seed:
            row = {SEED: seed, **row}
        return {name: value for name, value in row.items() if self.accepts is None or name in self.accepts}


def resolve_tools(paths: Sequence[str]) -> list[Tool]:
    """The tools of `episode.tools`, in their order.

    Raises:
        UserError: a path leads nowhere or to what cannot be a tool, or two have the same name.
    """
    named = [(path, f"episode.tools.{index}") for index, path in enumerate(paths)]
    return _tools_of([load_object(path, setting=setting) for path, setting in named])


def tools_of_callables(functions: Sequence[Callable[..., Any]]) -> list[Tool]:
    """Tools that came as Python objects.

    Raises:
        UserError: one cannot be a tool, or two have the same name.
    """
    return _tools_of(functions)


def _tools_of(functions: Sequence[Callable[..., Any]]) -> list[Tool]:
    tools = [tool_of(function, f"episode.tools.{index}") for index, function in enumerate(functions)]
    by_name(tools, "episode.tools")
    return tools


def resolve_environments(config: EpisodeConfig, tools: Sequence[Tool] = ()) -> dict[str | None, EnvironmentKind]:
    """The environments of `episode.environment` by name; a single one has the name None.

    Of each an object is made and closed again: it shows that one can be made, and of which class.

    Args:
        config: the section `episode`.
        tools: those of `episode.tools`, with which the methods share their names.

    Raises:
        UserError: a path leads nowhere, an environment cannot be made or lacks what one needs.
    """
    kinds: dict[str | None, EnvironmentKind] = {}
    for name, environment in config.environments.items():
        setting = _setting(name)
        target = load_object(environment.path, setting=setting)
        kinds[name] = environment_kind(target, name, tools, params=environment.params, shown=environment.path)
    return kinds


def environment_kind(
    target: Any,
    name: str | None,
    tools: Sequence[Tool] = (),
    *,
    params: Mapping[str, Any] | None = None,
    shown: str | None = None,
) -> EnvironmentKind:
    """Look at an environment.

    Args:
        target: its class, or a function that makes an object of it.
        name: under which rows ask for it; None if it is the only one.
        tools: those of `episode.tools`.
        params: keyword arguments of `target`.
        shown: what messages call it; its own name if None.

    Raises:
        UserError: it cannot be made, or lacks what an environment needs.
    """
    where = f"{_setting(name)}: {shown or getattr(target, '__qualname__', repr(target))}"
    make = _maker(target, dict(params or {}), where)
    try:
        instance = make()
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} cannot be made: {origin(error)}") from error
    cls = type(instance)
    # Listed on the class: on the object, properties would be evaluated.
    methods = dict(inspect.getmembers(cls, predicate=inspect.isfunction))
    if "reset" not in methods:
        raise UserError(
            f"{where} gives an object of class {cls.__name__}, which has no method reset; an environment has "
            "reset(self, **columns), which begins an episode"
        )
    own = [
        tool_of(function, where)
        for method, function in methods.items()
        if method not in NO_TOOLS and not method.startswith("_")
    ]
    by_name([*tools, *own], where)
    accepts, required = _parameters(methods["reset"])
    kind = EnvironmentKind(
        name,
        make,
        own,
        takes_seed=SEED in _named(methods["reset"]),
        responds="respond" in methods,
        has_reward="get_reward" in methods,
        cls=cls,
        accepts=accepts,
        required=required,
    )
    try:
        close_environment(instance)
    except Exception as error:
        raise UserError(f"{where} cannot be closed: {origin(error)}") from error
    return kind


def check_reset(kinds: Mapping[str | None, EnvironmentKind], columns: Sequence[str], setting: str) -> None:
    """Check that a dataset has what `reset` requires, and the column that chooses among several environments.

    Args:
        kinds: the environments by name.
        columns: the dataset's, without the prompt column.
        setting: `data` or `data.eval`, for the message.

    Raises:
        UserError: a column is missing.
    """
    if kinds and None not in kinds and COLUMN not in columns:
        raise UserError(
            f"{setting} has no column {COLUMN}, which says for each row which of episode.environment it is for "
            f"({', '.join(map(str, kinds))}); it has: {', '.join(columns) or 'none beside the prompt'}"
        )
    for kind in kinds.values():
        # With several, a column may be empty but cannot be absent: rows are of one table.
        missing = sorted(kind.required.difference(columns, ("prompt", SEED)))
        if missing:
            raise UserError(
                f"{_setting(kind.name)}: reset of {kind.class_name} needs the column {', '.join(missing)}, which "
                f"{setting} does not have (it has: {', '.join(columns) or 'none beside the prompt'})"
            )


def environment_rewards(kinds: Mapping[str | None, EnvironmentKind]) -> list[RewardFunction]:
    """A reward function for each class with `get_reward`, named after it, with weight 1.

    As in TRL, it scores episodes of exactly that class and says None to all others, subclasses too.
    """
    types = dict.fromkeys(kind.cls for kind in kinds.values() if kind.has_reward)
    return [reward_from_callable(EnvironmentReward(cls), name=cls.__name__) for cls in types]


def check_scored(kinds: Mapping[str | None, EnvironmentKind], functions: Sequence[RewardFunction]) -> None:
    """Check that there is something to learn from.

    Raises:
        UserError: there is no reward function, and no environment has `get_reward`.
    """
    if not functions:
        classes = ", ".join(dict.fromkeys(kind.class_name for kind in kinds.values())) or "no environment"
        raise UserError(
            f"rewards: there are none, and {classes} has no method get_reward; write one, or name a reward "
            "function"
        )


class EnvironmentReward:
    """A reward function that asks environments of one class.

    Args:
        cls: with `get_reward`, which may be async.
    """

    def __init__(self, cls: type[Any]) -> None:
        self._cls = cls
        self._seconds = 0.0

    def __call__(self, environments: Sequence[Any]) -> Any:
        """What each of them says, None for those of other classes; an awaitable of it if they are async."""
        began = time.perf_counter()
        own = [environment if type(environment) is self._cls else None for environment in environments]
        rewards = [None if one is None else one.get_reward() for one in own]
        if inspect.iscoroutinefunction(self._cls.get_reward):
            return self._awaited(rewards, began)
        self._seconds += time.perf_counter() - began
        return rewards

    async def _awaited(self, rewards: Sequence[Any], began: float) -> list[Any]:
        async def of(reward: Any) -> Any:
            return None if reward is None else await reward

        values = await asyncio.gather(*map(of, rewards))
        self._seconds += time.perf_counter() - began
        return values

    def take_seconds(self) -> float:
        """Seconds that it has taken since it was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def seconds_of_environments(functions: Sequence[RewardFunction]) -> dict[str, float]:
    """`env/reward_s`, the seconds of `get_reward` since this was asked last; nothing where there is none."""
    own = [one.call for one in functions if isinstance(one.call, EnvironmentReward)]
    return {"env/reward_s": sum(reward.take_seconds() for reward in own)} if own else {}


def close_environment(instance: Any) -> None:
    """Call `close`, where there is one; one that is async has an event loop of its own."""
    close = getattr(type(instance), "close", None)
    if not callable(close):
        return
    result = instance.close()
    if inspect.isawaitable(result):
        asyncio.run(_awaited(result))


async def _awaited(result: Any) -> None:
    await result


def _setting(name: str | None) -> str:
    return "episode.environment" if name is None else f"episode.environment.{name}"


def _maker(target: Any, params: dict[str, Any], where: str) -> Callable[[], Any]:
    """Calls `target` with `params`."""
    if not callable(target):
        raise UserError(f"{where} is of type {type(target).__name__}, neither a class nor a function")
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some classes have none
        signature = None
    try:
        if signature is not None:
            signature.bind(**params)
    except TypeError as error:
        raise UserError(f"{where}{signature} cannot be called with params: {error}") from error
    return lambda: target(**copy.deepcopy(params))


def _named(method: Callable[..., Any]) -> set[str]:
    """Parameters that can be given by name."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _parameters(method: Callable[..., Any]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Names that a method takes (None if any), and those of them without a default."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    names = _named(method)
    required = frozenset(p.name for p in parameters if p.name in names and p.default is p.empty)
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if any_name else frozenset(names), required
