"""What a model's files say without loading it. No torch, so that `grpo check` can ask."""

from __future__ import annotations

import json
import math
from pathlib import Path

from grpo_cli.errors import UserError


def locate_gguf(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Split what a recipe names into a folder (or Hub id) and the GGUF file in it, if it is one.

    Raises:
        UserError: a local file or folder that is not there, or a folder with several GGUF files and no choice.
    """
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"model.name: there is no file {name}")
        return str(path.parent), path.name
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"model.name: there is no folder {name}")
        return name, gguf_file
    found = sorted(file.name for file in path.glob("*.gguf"))
    if gguf_file is not None and gguf_file not in found:
        raise UserError(f"model.gguf_file: there is no {gguf_file} in {name}; found {', '.join(found) or 'none'}")
    if gguf_file is None and found and not (path / "config.json").exists():
        if len(found) > 1:
            raise UserError(f"model.gguf_file: {name} holds several, set it to one of {', '.join(found)}")
        gguf_file = found[0]
    return str(path), gguf_file


def count_parameters(folder: Path) -> int | None:
    """Number of parameters in a folder's safetensors files, from their headers; None if there are none.

    A safetensors file starts with the length of its JSON header in 8 bytes, little-endian.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total or None
