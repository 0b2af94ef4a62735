"""Writes `docs/recipe.md` from the schema, so that the page cannot drift from the code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from grpo_cli.recipe.loss_types import types_reading
from grpo_cli.recipe.messages import section_of
from grpo_cli.recipe.raw import KeyPath, dotted
from grpo_cli.recipe.schema import LossConfig, Recipe

INTRODUCTION = """\
# Recipe reference

Generated from `grpo_cli/recipe/schema.py` by `make docs`. Every key may be set on the command line:
`--set train.max_steps=3`, list items by index: `--set rewards.0.weight=2`.
A key that is not on this page is an error, and an error about one that is names its line here. Paths are
relative to the folder that `grpo` is started in.
"""


def reference_page() -> str:
    """The page as Markdown."""
    return "".join(text for _, text in _parts())


def line_of(key: KeyPath) -> int | None:
    """The line of the page that explains a key, or the nearest part of its path that has one; counted from 1."""
    lines = _lines()
    plain = tuple(0 if isinstance(part, int) else part for part in key)
    return next((lines[plain[:end]] for end in range(len(plain), 0, -1) if plain[:end] in lines), None)


@cache
def _lines() -> dict[KeyPath, int]:
    lines: dict[KeyPath, int] = {}
    line = 1
    for key, text in _parts():
        if key:
            lines[key] = line + len(text) - len(text.lstrip("\n"))
        line += text.count("\n")
    return lines


def _parts() -> Iterator[tuple[KeyPath, str]]:
    """The page in parts, each with the key that it explains. The later of two with one key says more."""
    yield (), INTRODUCTION
    yield from _section((), Recipe)


def _section(prefix: KeyPath, model: type[BaseModel]) -> Iterator[tuple[KeyPath, str]]:
    rows, inner = [], []
    for name, info in model.model_fields.items():
        key = (*prefix, name)
        if (found := section_of(info.annotation)) is not None:
            inner.append((key, *found, info.description or ""))
            if not prefix:
                continue
        row = f"| `{name}` | {_type_name(info)} | {_default(info)} | {_cell(_meaning(model, name, info))} |\n"
        rows.append((key, row))
    if prefix and rows:
        yield (), "\n| key | type | default | meaning |\n|---|---|---|---|\n"
        yield from rows
    for key, section, is_list, description in inner:
        title = dotted((*key, "N") if is_list else key)
        yield key, f"\n## `{title}`\n\n{description}\n"
        yield from _section((*key, 0) if is_list else key, section)


def _meaning(model: type[BaseModel], name: str, info: FieldInfo) -> str:
    readers = types_reading(name) if model is LossConfig else []
    only = f" Read by {', '.join(f'`{reader}`' for reader in readers)}." if readers else ""
    return f"{info.description or ''}{only}"


def _type_name(info: FieldInfo) -> str:
    annotation = info.annotation
    if section_of(annotation) is not None:
        return "section"
    if choices := choices_of(info):
        return " · ".join(f"`{choice}`" for choice in choices)
    text = re.sub(r"typing\.|<class '|'>", "", str(annotation))
    if "Annotated" in text:
        text = "list[str]" if text.startswith("list") else "tuple[float, float]"
    names = {"str": "string", "int": "whole number", "float": "number", "bool": "true or false"}
    optional = text.endswith(" | None")
    text = text.removesuffix(" | None")
    return _cell(names.get(text, text) + (", or empty" if optional else ""))


def choices_of(info: FieldInfo) -> list[str]:
    """The values that a setting may have, as a recipe writes them; empty where they are not a few."""
    choices = info.examples or (get_args(info.annotation) if "Literal" in str(info.annotation) else [])
    return [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]


def values_of(info: FieldInfo) -> list[str]:
    """Values that a shell can offer for a setting: its choices, or else its default if that needs no quotes."""
    if info.annotation is bool:
        return ["true", "false"]
    if choices := choices_of(info):
        return choices
    written = info.default if isinstance(info.default, str) else json.dumps(info.default, default=str)
    return [written] if re.fullmatch(r"[\w.:/+-]+", written) and not info.is_required() else []


def _default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "required"
    return "empty" if info.default in (None, "", [], {}) else f"`{json.dumps(info.default)}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference_page(), end="")
