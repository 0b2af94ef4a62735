"""From YAML and `--set` to a valid `Recipe`, or to one error that names every problem with its file and line."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from grpo_cli.recipe.contradictions import contradictions
from grpo_cli.recipe.messages import Problem, describe
from grpo_cli.recipe.overrides import apply_override
from grpo_cli.recipe.raw import KeyPath, RawRecipe, RecipeError, YamlDumper, key_path, read_yaml, readable
from grpo_cli.recipe.schema import Recipe

PLACEHOLDERS: dict[str, Any] = {
    "model": {"name": "?"},
    "data": {"name": "?"},
    "rewards": ["?:?"],
    "train": {"output_dir": "?", "max_steps": 1},
}
"""Stand-ins for required values that are missing, so that the rest of a broken recipe is checked as well."""

MAX_PROBLEMS = 100
"""Problems that one message names. Looking for the right name of ten thousand wrong keys takes a minute."""


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Return the validated recipe.

    Args:
        recipe: path of a YAML file, a mapping of the same shape, or a `Recipe`.
        overrides: `key.path=value` strings, the value in YAML; list items by index (`rewards.0.weight=2`).

    Raises:
        RecipeError: with one line for every problem found, in the order of the file.
    """
    raw = read_recipe(recipe)
    for override in overrides:
        apply_override(raw, override)
    return validate(raw)


def read_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> RawRecipe:
    """A recipe of any kind as plain values, not yet validated.

    Raises:
        RecipeError: a file that cannot be read as a recipe.
    """
    if isinstance(recipe, Recipe):
        return RawRecipe(recipe.model_dump(mode="json"), "recipe")
    if isinstance(recipe, Mapping):
        return RawRecipe(copy.deepcopy(dict(recipe)), "recipe")
    return read_yaml(Path(recipe))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to an equal one."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=YamlDumper, sort_keys=False, allow_unicode=True)


def validate(raw: RawRecipe) -> Recipe:
    """Validate `raw` against the schema and its contradictions.

    Raises:
        RecipeError: with one line for each problem.
    """
    order = {place: index for index, place in enumerate(raw.places.values())}

    def position(key: KeyPath) -> int:
        return order.get(raw.place(key), len(raw.places))

    problems: list[Problem] = []
    count = 0
    recipe: Recipe | None
    try:
        recipe = Recipe.model_validate(raw.values)
    except ValidationError as error:
        details = sorted(error.errors(include_url=False), key=lambda detail: position(detail["loc"]))
        count = len(details)
        problems = [describe(detail) for detail in details[:MAX_PROBLEMS]]
        recipe = _salvage(raw.values, [problem.key for problem in problems]) if count <= MAX_PROBLEMS else None
    if recipe is not None:
        broken = {problem.key for problem in problems}
        around = {key[:end] for key in broken for end in range(len(key))}
        for name, message in contradictions(recipe):
            key = key_path(name)
            if key not in around and not any(key[:end] in broken for end in range(len(key) + 1)):
                problems.append(Problem(key, f"{name} {message}"))
    if recipe is None or problems:
        problems.sort(key=lambda problem: position(problem.key))
        lines = {
            readable(f"{raw.place(one.key)}: {one.message}"): one.key if one.about is None else one.about
            for one in problems
        }
        more = max(count, len(lines)) - MAX_PROBLEMS
        shown = [*lines][:MAX_PROBLEMS]
        if more > 0:
            shown.append(f"{raw.source}: {more} further problems")
        raise RecipeError("\n".join(shown), [*lines.values()][:MAX_PROBLEMS])
    return recipe


def _salvage(values: dict[str, Any], broken: list[KeyPath]) -> Recipe | None:
    """The recipe without its broken keys, so that what else is wrong is found too; None if that is no recipe."""
    values = copy.deepcopy(values)
    # Where a section inside a section lacks a required key, the whole inner section is left out.
    incomplete = [key[:-1] for key in broken if len(key) > 2]
    for key in sorted([*broken, *incomplete], key=len, reverse=True):
        target: Any = values
        for part in key[:-1]:
            try:
                target = target[part]
            except (KeyError, IndexError, TypeError):
                target = None
        if isinstance(target, dict):
            target.pop(key[-1], None)
        elif isinstance(target, list) and isinstance(key[-1], int) and key[-1] < len(target):
            target[key[-1]] = f"?:broken{key[-1]}"
    for section, placeholder in PLACEHOLDERS.items():
        given = values.get(section)
        if isinstance(given, dict) and isinstance(placeholder, dict):
            required = {k: v for k, v in placeholder.items() if (section, k) in broken}
            values[section] = required | given
        elif not given and (section,) in broken:
            values[section] = placeholder
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None
