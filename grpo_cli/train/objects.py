"""What a Python caller has as objects, in place of the recipe's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_cli.errors import UserError
from grpo_cli.recipe.load import read_recipe, validate
from grpo_cli.recipe.overrides import apply_override
from grpo_cli.recipe.schema import Recipe
from grpo_cli.rollout.engine import RolloutEngine, TurnEngine

IN_MEMORY = "in-memory"
"""Stands in the written recipe for a model or data that came as an object."""


Engine = RolloutEngine | TurnEngine | Callable[[RolloutEngine], RolloutEngine]
"""What generates whole completions or turns, or a function that makes it of the recipe's."""


@dataclass(frozen=True)
class Objects:
    """What `grpo_cli.train` was given; `None` is what the recipe says."""

    model: Any = None
    tokenizer: Any = None
    rewards: Sequence[Callable[..., Any]] | None = None
    train_data: Any = None
    eval_data: Any = None
    callbacks: Sequence[Any] = ()
    optimizer: Any = None
    engine: Engine | None = None
    tools: Sequence[Callable[..., Any]] | None = None
    environment: Any = None


def recipe_with_objects(
    recipe: str | Path | Mapping[str, Any] | Recipe, objects: Objects, overrides: Sequence[str]
) -> Recipe:
    """The validated recipe, in which what came as an object is named as such.

    Raises:
        UserError: the recipe is wrong, or an object does not go with it.
    """
    raw = read_recipe(recipe)
    for override in overrides:
        apply_override(raw, override)
    values = raw.values
    if objects.model is not None:
        name = getattr(objects.model.config, "name_or_path", "") or IN_MEMORY
        dtype = str(objects.model.dtype).removeprefix("torch.")
        given = values.get("model") or {}
        values["model"] = {"name": name, "dtype": dtype, **given}
        if values["model"]["dtype"] != dtype:
            raise UserError(
                f"model.dtype is {given['dtype']}, but the model object was loaded in {dtype}; "
                f"load it with dtype={given['dtype']}, or change model.dtype"
            )
        if name == IN_MEMORY and objects.tokenizer is None and not given.get("tokenizer"):
            raise UserError("model: a model object without a name needs its tokenizer too; pass tokenizer=")
    if objects.engine is not None:
        _check_engine(objects.engine, values)
    _name_episode(objects, values)
    if objects.train_data is not None:
        values["data"] = {"name": IN_MEMORY, **(values.get("data") or {})}
    if objects.eval_data is not None:
        data = values.get("data") or {}
        values["data"] = {**data, "eval": {"name": IN_MEMORY, **(data.get("eval") or {})}}
    if objects.rewards is not None:
        listed = values.get("rewards") or []
        settings = listed if len(listed) == len(objects.rewards) else [{}] * len(objects.rewards)
        for index, entry in enumerate(settings):
            if isinstance(entry, dict) and entry.get("isolate"):
                raise UserError(
                    f"rewards.{index}.isolate: a function that came as an object cannot be called in another "
                    "process; remove isolate, or name it in the recipe as module:function"
                )
        values["rewards"] = [
            {**own_name(function), **(entry if isinstance(entry, dict) else {}), "path": path_of(function)}
            | {"params": {}, "model": None}
            for entry, function in zip(settings, objects.rewards, strict=True)
        ]
    return validate(raw)


def _name_episode(objects: Objects, values: dict[str, Any]) -> None:
    """Name tools and environments that came as objects in the recipe's `episode`."""
    if objects.tools is None and objects.environment is None:
        return
    episode = dict(values.get("episode") or {})
    if objects.tools is not None:
        episode["tools"] = [path_of(tool) for tool in objects.tools]
    if isinstance(objects.environment, Mapping):
        episode["environment"] = {name: path_of(one) for name, one in objects.environment.items()}
    elif objects.environment is not None:
        episode["environment"] = path_of(objects.environment)
    values["episode"] = episode


def _check_engine(engine: Engine, values: Mapping[str, Any]) -> None:
    """Raise UserError for an object that is no engine, or one beside an engine that the recipe names."""
    if not isinstance(engine, (RolloutEngine, TurnEngine)):
        if callable(engine):
            return
        raise UserError(
            f"engine: {type(engine).__name__} lacks one of the methods of an engine: update_weights, generate or "
            "stream, release_memory, close"
        )
    named = [key for key in ("engine", "server", "vllm", "replay") if (values.get("generation") or {}).get(key)]
    if named:
        raise UserError(f"generation.{named[0]}: an engine object was given, so it would not be used; remove it")


def own_name(function: Callable[..., Any]) -> dict[str, str]:
    """The `name` that an object has given itself, as those of TRL's reward functions that have parameters do."""
    name = getattr(function, "__name__", None)
    return {"name": name} if isinstance(name, str) and not hasattr(function, "__qualname__") else {}


def path_of(function: Callable[..., Any]) -> str:
    """`module:name` of a callable, for the written recipe."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
