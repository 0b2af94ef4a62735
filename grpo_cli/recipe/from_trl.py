"""Writes `docs/from_trl.md`: where each argument of TRL's trainer has gone, from the table beside this file.

Our keys and defaults on the page are the schema's, so that it cannot drift from the code. Never imports TRL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from grpo_cli.recipe.messages import section_of
from grpo_cli.recipe.schema import Recipe

TABLE = Path(__file__).with_name("from_trl.yaml")

Row = Mapping[str, Any]
"""What the table says of one argument; the head of `from_trl.yaml` lists its entries."""


def read_table() -> dict[str, Any]:
    """The table: its `introduction`, and its `sections` with `title`, `of` and `arguments`."""
    table: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def from_trl_page() -> str:
    """The page as Markdown."""
    table = read_table()
    sections = [line for section in table["sections"] for line in _section(section)]
    return "".join([table["introduction"], *_differences(table["sections"]), *sections])


def default_of(key: str) -> Any:
    """The schema's default of a key such as `loss.beta`; those of an item of a list stand under index 0.

    Raises:
        KeyError: there is no such key.
    """
    model: type[BaseModel] = Recipe
    info: FieldInfo | None = None
    for part in key.split("."):
        if part == "0":
            continue
        info = model.model_fields[part]
        found = section_of(info.annotation)
        model = found[0] if found is not None else BaseModel
    if info is None:
        raise KeyError(key)
    return info.default


def _differences(sections: list[dict[str, Any]]) -> Iterator[str]:
    yield "\n## Defaults that differ\n\n| TRL's argument | TRL | here | what it means |\n|---|---|---|---|\n"
    for section in sections:
        for name, row in section["arguments"].items():
            if "differs" in row:
                here = row.get("here", _ours(row))
                yield f"| `{name}` | {_shown(row['default'])} | {here} | {row['differs']} |\n"


def _section(section: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {section['title']}\n"
    if "text" in section:
        yield f"\n{section['text']}\n"
    has_defaults = any("default" in row for row in section["arguments"].values())
    if not has_defaults:
        yield "\n| TRL | here |\n|---|---|\n"
    else:
        yield "\n| TRL | default | here | default here |\n|---|---|---|---|\n"
    for name, row in section["arguments"].items():
        defaults = (f" {_shown(row['default'])} |", f" {_ours(row)} |") if has_defaults else ("", "")
        yield f"| `{name}` |{defaults[0]} {_place(row)} |{defaults[1]}\n"


def _place(row: Row) -> str:
    """Where an argument has gone."""
    if "key" in row:
        return f"`{row['key'].replace('.0.', '.N.')}`" + (f": {row['note']}" if "note" in row else "")
    if "how" in row:
        return str(row["how"])
    return f"not needed: {row['not_needed']}" if "not_needed" in row else f"not there: {row['not_there']}"


def _ours(row: Row) -> str:
    """The schema's default of the row's key; nothing where it has none."""
    return _shown(default_of(row["key"])) if "key" in row else ""


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    return "empty" if default in (None, "", [], {}) else f"`{json.dumps(default)}`"


if __name__ == "__main__":
    print(from_trl_page(), end="")
