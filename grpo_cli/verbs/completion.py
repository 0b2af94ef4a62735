"""What the shell offers when TAB is pressed: recipes, and settings with the values that they may have. No torch.

The shell puts a space after an offer that is the only one. So a folder that is the only one is looked into, and a
setting that is the only one is offered with its values.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

RECIPE_SUFFIXES = (".yaml", ".yml")


def complete_recipe(incomplete: str) -> list[str]:
    """YAML files and folders, among them those of runs, whose paths begin with `incomplete`."""
    found = sorted(_files_and_folders(incomplete))
    while len(found) == 1 and found[0].endswith("/") and (inside := sorted(_files_and_folders(found[0]))):
        found = inside
    return found


def complete_setting(incomplete: str) -> list[str]:
    """`KEY=` of each setting that begins with `incomplete`; of one that is the only one, also with its values."""
    from grpo_cli.recipe.messages import all_fields
    from grpo_cli.recipe.raw import dotted
    from grpo_cli.recipe.reference import values_of

    index = next(iter(re.findall(r"\.(\d+)", incomplete)), "0")
    fields = {dotted(key).replace(".0.", f".{index}."): info for key, info in all_fields() if len(key) > 1}
    found = [key for key in fields if f"{key}=".startswith(incomplete)]
    offers = [f"{key}=" for key in found]
    return offers if len(found) != 1 else offers + [f"{found[0]}={value}" for value in values_of(fields[found[0]])]


def _files_and_folders(beginning: str) -> Iterator[str]:
    folder, name = os.path.split(beginning)
    with contextlib.suppress(OSError):  # a folder that is not there, or may not be read, has nothing to offer
        for path in (Path(folder).expanduser() if folder else Path()).iterdir():
            if path.name.startswith(".") and not name.startswith("."):
                continue
            if path.name.startswith(name) and (path.is_dir() or path.suffix in RECIPE_SUFFIXES):
                yield os.path.join(folder, path.name) + "/" * path.is_dir()
