"""Writes `docs/recipe.md` from the schema, so that the page cannot drift from the code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from grpo_cli.recipe.loss_types import types_reading
from grpo_cli.recipe.messages import section_of
from grpo_cli.recipe.schema import LossConfig, Recipe

INTRODUCTION = """\
# Recipe reference

Generated from `grpo_cli/recipe/schema.py` by `make docs`. Every key may be set on the command line:
`--set train.max_steps=3`, list items by index: `--set rewards.0.weight=2`.
A key that is not on this page is an error. Paths are relative to the folder that `grpo` is started in.
"""


def reference_page() -> str:
    """The page as Markdown."""
    return INTRODUCTION + "".join(_section("", Recipe))


def _section(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    rows, inner = [], []
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        if (found := section_of(info.annotation)) is not None:
            inner.append((key, *found, info.description or ""))
            if not prefix:
                continue
        rows.append(
            f"| `{name}` | {_type_name(info)} | {_default(info)} | {_cell(_meaning(model, name, info))} |\n"
        )
    if prefix and rows:
        yield "\n| key | type | default | meaning |\n|---|---|---|---|\n"
        yield from rows
    for key, section, is_list, description in inner:
        yield f"\n## `{key}{'.N' if is_list else ''}`\n\n{description}\n"
        yield from _section(f"{key}.", section)


def _meaning(model: type[BaseModel], name: str, info: FieldInfo) -> str:
    readers = types_reading(name) if model is LossConfig else []
    only = f" Read by {', '.join(f'`{reader}`' for reader in readers)}." if readers else ""
    return f"{info.description or ''}{only}"


def _type_name(info: FieldInfo) -> str:
    annotation = info.annotation
    if section_of(annotation) is not None:
        return "section"
    text = re.sub(r"typing\.|<class '|'>", "", str(annotation))
    if "Literal" in text or info.examples:
        choices = info.examples or get_args(annotation)
        choices = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
        return " · ".join(f"`{choice}`" for choice in choices)
    if "Annotated" in text:
        text = "list[str]" if text.startswith("list") else "tuple[float, float]"
    names = {"str": "string", "int": "whole number", "float": "number", "bool": "true or false"}
    optional = text.endswith(" | None")
    text = text.removesuffix(" | None")
    return _cell(names.get(text, text) + (", or empty" if optional else ""))


def _default(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "required"
    return "empty" if info.default in (None, "", [], {}) else f"`{json.dumps(info.default)}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference_page(), end="")
