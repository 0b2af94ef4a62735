"""What the shell offers when TAB is pressed: recipes, and settings with the values that they may have. No torch.

The shell puts a space after an offer that is the only one. So a folder that is the only one is looked into, and a
setting that is the only one is offered with its values. bash completes what stands after `=` as a word of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path

RECIPE_SUFFIXES = (".yaml", ".yml")

KEY_BEFORE = "_GRPO_KEY_BEFORE"
"""Variable of the environment: `KEY=` that stands before the word at the cursor."""


def set_key_aside(environment: MutableMapping[str, str]) -> None:
    """Of `--set loss.type=g`, three words to bash, leave `--set g` to typer, and the rest in `KEY_BEFORE`.

    Args:
        environment: with the `COMP_WORDS` and `COMP_CWORD` that bash has told, or without.
    """
    words, cursor = environment.get("COMP_WORDS", "").split("\n"), int(environment.get("COMP_CWORD", 0))
    if words[cursor:] == ["="]:  # nothing is written behind it yet
        words, cursor = [*words, ""], cursor + 1
    if words[cursor - 1 : cursor] != ["="] or words[cursor - 3 : cursor - 2] != ["--set"]:
        return
    environment[KEY_BEFORE] = f"{words[cursor - 2]}="
    environment["COMP_WORDS"] = "\n".join([*words[: cursor - 2], *words[cursor:]])
    environment["COMP_CWORD"] = str(cursor - 2)


def complete_recipe(incomplete: str) -> list[str]:
    """YAML files and folders, among them those of runs, whose paths begin with `incomplete`."""
    found = sorted(_files_and_folders(incomplete))
    while len(found) == 1 and found[0].endswith("/") and (inside := sorted(_files_and_folders(found[0]))):
        found = inside
    return found


def complete_setting(incomplete: str) -> list[str]:
    """`KEY=` of each setting that begins with `incomplete`; of one that is the only one, also with its values.

    Without what is in `KEY_BEFORE`, which stands there already.
    """
    from grpo_cli.recipe.messages import all_fields
    from grpo_cli.recipe.raw import dotted
    from grpo_cli.recipe.reference import values_of

    before = os.environ.get(KEY_BEFORE, "")
    key_begun, is_whole, _ = f"{before}{incomplete}".partition("=")
    index = next(iter(re.findall(r"\.(\d+)", key_begun)), "0")
    fields = {dotted(key).replace(".0.", f".{index}."): info for key, info in all_fields() if len(key) > 1}
    found = [key for key in fields if key == key_begun or (key.startswith(key_begun) and not is_whole)]
    offers = [f"{key}=" for key in found]
    if len(found) == 1:
        offers += [f"{found[0]}={value}" for value in values_of(fields[found[0]])]
    return [offer.removeprefix(before) for offer in offers if offer != before]


def _files_and_folders(beginning: str) -> Iterator[str]:
    folder, name = os.path.split(beginning)
    with contextlib.suppress(OSError):  # a folder that is not there, or may not be read, has nothing to offer
        for path in (Path(folder).expanduser() if folder else Path()).iterdir():
            if path.name.startswith(".") and not name.startswith("."):
                continue
            if path.name.startswith(name) and (path.is_dir() or path.suffix in RECIPE_SUFFIXES):
                yield os.path.join(folder, path.name) + "/" * path.is_dir()
