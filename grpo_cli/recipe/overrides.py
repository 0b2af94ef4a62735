"""Settings from the command line, `--set KEY=VALUE` and `--server HOST`, put into a recipe as it was written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from grpo_cli.recipe.raw import MAX_LEVELS, KeyPath, RawRecipe, RecipeError, dotted, explain, key_path, parse


def server_overrides(servers: Sequence[str]) -> list[str]:
    """`--server HOST[:PORT]` as overrides: these servers, in place of one that the recipe would start."""
    if not servers:
        return []
    urls = yaml.dump(list(servers), default_flow_style=True, width=2**31).strip()
    own = ("spawn=false", "port=null", "tensor_parallel_size=1", f"urls={urls}")
    return ["generation.engine=vllm_server", "generation.vllm={}", *(f"generation.server.{key}" for key in own)]


def apply_override(raw: RawRecipe, override: str) -> None:
    """Set one `key.path=value` in `raw`. Sections that are not there are made; an index may append to its list.

    Raises:
        RecipeError: it is not of that form, or its path leads into something that has no keys.
    """
    name, separator, text = override.partition("=")
    key = key_path(name.strip())
    if not separator or "" in key:
        raise RecipeError(f"--set {override}: write --set key.path=value")
    if len(key) > MAX_LEVELS:
        raise RecipeError(f"--set {override}: {len(key)} keys inside one another; no setting has that many")
    try:
        value, _ = parse(text, lambda line: f"--set {override}")
    except yaml.YAMLError as error:
        _, problem = explain(error, text)
        raise RecipeError(f"--set {override}: the value is not valid YAML: {problem}") from error
    target: Any = raw.values
    created: list[KeyPath] = []
    for position, part in enumerate(key):
        is_last = position == len(key) - 1
        parent = dotted(key[:position])
        if isinstance(target, list):
            if not isinstance(part, int) or part > len(target):
                raise RecipeError(
                    f"--set {override}: {parent} has {len(target)} entries; write {parent}.0 and so on, or "
                    f"{parent}.{len(target)} to append one"
                )
            if part == len(target):
                target.append({})
                created.append(key[: position + 1])
        elif isinstance(target, dict):
            if target.get(part) is None:
                target[part] = {}
                created.append(key[: position + 1])
        else:
            raise RecipeError(f"--set {override}: {parent} has no keys of its own")
        if is_last:
            target[part] = value
        elif key[0] == "rewards" and isinstance(target[part], str):
            target[part] = {"path": target[part]}
        target = target[part]
    raw.places = {place: where for place, where in raw.places.items() if place[: len(key)] != key}
    raw.places |= dict.fromkeys([*created, key], f"--set {override}")
