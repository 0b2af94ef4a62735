"""A recipe in a paragraph, its settings that are not defaults, and where recipes of several runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_cli.recipe.differences import ABSENT, differences
from grpo_cli.recipe.raw import readable
from grpo_cli.recipe.schema import Recipe

MAX_VALUE = 300
"""Characters of a setting's value."""

TOLD_ELSEWHERE = ("train.output_dir",)
"""Settings in which every two runs differ."""


def in_words(recipe: Recipe) -> str:
    """What a recipe does, in a few sentences."""
    return " ".join([_training(recipe), _generation(recipe), _rewards(recipe), _loss(recipe), _optimizer(recipe)])


def _training(recipe: Recipe) -> str:
    train, model = recipe.train, recipe.model
    what = f"low-rank adapters (rank {model.lora.r})" if model.lora else "all weights"
    passes = f"{train.epochs} passes over the prompts"
    length = passes if train.max_steps is None else _counted(train.max_steps, "step")
    source = f" from {recipe.data.name}" if recipe.data.name else ""
    group = recipe.generation.num_generations
    prompts = _counted(train.prompts_per_step, "prompt")
    return (
        f"It trains {what} of {model.name} for {length}. A step takes {prompts}{source} and samples {group} "
        f"completions of each, {train.prompts_per_step * group} in all."
    )


def _generation(recipe: Recipe) -> str:
    generation = recipe.generation
    engines = {
        "transformers": "sampled by the policy itself",
        "vllm": "sampled by vLLM in the training process",
        "vllm_server": "sampled by vLLM servers",
        "replay": "those that an earlier run has stored",
    }
    filters = "".join(f", {name} {getattr(generation, name):g}" for name in generation.filters)
    text = (
        f"Completions are {engines[generation.engine]}, at temperature {generation.temperature:g}{filters}, "
        f"of at most {_counted(generation.max_completion_tokens, 'token')}."
    )
    if recipe.episode is None:
        return text
    parts = [one.path for one in recipe.environments.values()] + recipe.episode.tools
    return f"{text} Each is an episode of at most {recipe.episode.max_turns} turns with {_listed(parts)}."


def _rewards(recipe: Recipe) -> str:
    if not recipe.rewards:
        return "The environment scores them."
    own = [one.metric_name + (f" (weight {one.weight:g})" if one.weight != 1 else "") for one in recipe.rewards]
    return f"They are scored by {_listed(own)}."


def _loss(recipe: Recipe) -> str:
    loss, parts = recipe.loss, []
    if not loss.is_function and loss.row.surrogate == "clipped":
        parts.append(f"ratios are clipped to {1 - loss.epsilon:g} and {1 + loss.clip_high:g}")
    parts.append(f"a KL to the reference weighs {loss.beta:g}" if loss.beta else "there is no KL")
    if loss.sampler_correction is not None:
        parts.append("tokens are weighed by policy over sampler")
    return f"The loss is {loss.type}: {_listed(parts)}."


def _optimizer(recipe: Recipe) -> str:
    optim, train = recipe.optim, recipe.train
    updates = train.optimizer_steps_per_rollout * train.num_iterations
    often = "once a step" if updates == 1 else f"{updates} times a step"
    schedule = optim.scheduler.replace("_", " ")
    rate = f"{optim.learning_rate:g}".replace("e-0", "e-")
    return f"{optim.name} updates {often}, with a learning rate of {rate} ({schedule})."


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(parts: Sequence[str]) -> str:
    """`a, b and c`"""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def non_defaults(recipe: Recipe) -> list[tuple[str, str]]:
    """Dotted keys whose values are not the schema's defaults, and the values as a recipe writes them."""
    return [
        (key, _written(value)) for key, value in _leaves("", recipe.model_dump(mode="json", exclude_defaults=True))
    ]


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, own in items:
        yield from _leaves(f"{key}.{name}" if key else str(name), own)


@dataclass(frozen=True)
class SettingOfRuns:
    key: str
    values: list[str]
    """Of each run."""


def differing_settings(recipes: Sequence[Recipe]) -> list[SettingOfRuns]:
    """The settings that not all recipes give the same value, but for those that differ in every two runs."""
    plain = [recipe.model_dump(mode="json") for recipe in recipes]
    found = [{one.key: one for one in differences(plain[0], other)} for other in plain[1:]]
    keys = dict.fromkeys(key for own in found for key in own if key not in TOLD_ELSEWHERE)
    rows = []
    for key in keys:
        first = next(own[key].before for own in found if key in own)
        values = [first, *(own[key].after if key in own else first for own in found)]
        rows.append(SettingOfRuns(key, [_written(value) for value in values]))
    return rows


def _written(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    return readable("empty" if value is None else json.dumps(value, ensure_ascii=False), MAX_VALUE)
