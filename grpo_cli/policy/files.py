"""What a model's files say without loading it. No torch, so that `grpo check` can ask."""

from __future__ import annotations

import json
import math
from pathlib import Path

from grpo_cli.errors import UserError
from grpo_cli.recipe.raw import is_pipe_or_device

MODEL_FILES = ("config.json", "adapter_config.json")
"""A folder without any of these and without a GGUF file holds no model."""


def locate_gguf(name: str, gguf_file: str | None, *, setting: str = "model.name") -> tuple[str, str | None]:
    """Split what a recipe names into a folder (or Hub id) and the GGUF file in it, if it is one.

    Args:
        name: Hub id, folder or `.gguf` file.
        gguf_file: the recipe's `model.gguf_file`.
        setting: where `name` was written, for messages. A `model.tokenizer` needs no model beside it.

    Raises:
        UserError: a local file or folder that is not there or holds no model, or a folder with several GGUF
            files and no choice.
    """
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"{setting}: there is no file {name}")
        return str(path.parent), path.name
    if not path.is_dir():
        if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            what = f"{name} is a file" if path.is_file() else f"there is no folder {name}"
            raise UserError(f"{setting}: {what}; set it to a Hub id, a folder or a .gguf file")
        return name, gguf_file
    found = sorted(file.name for file in path.glob("*.gguf"))
    if gguf_file is not None and gguf_file not in found:
        raise UserError(f"model.gguf_file: there is no {gguf_file} in {name}; found {', '.join(found) or 'none'}")
    has_model = any((path / file).exists() for file in MODEL_FILES)
    if gguf_file is None and found and not has_model:
        if len(found) > 1:
            raise UserError(f"model.gguf_file: {name} holds several, set it to one of {', '.join(found)}")
        gguf_file = found[0]
    if gguf_file is None and not has_model and setting != "model.tokenizer":
        raise UserError(
            f"{setting}: the folder {name} holds no model: there is no config.json or .gguf file in it"
        )
    return str(path), gguf_file


def check_gguf(path: Path) -> None:
    """Raise UserError if the file does not begin as every GGUF file does."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.name: {path} is not a GGUF file, or a damaged one; download it again")


def read_chat_template(template: str) -> str:
    """The template itself, or what the file of that name holds.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    if "{" in template:
        return template
    try:
        path = Path(template).expanduser()
        if is_pipe_or_device(path):
            raise UserError(f"model.chat_template: {template} is a pipe or a device, not a file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        message = f"there is no file {template}; a template itself would have a {{ in it"
        raise UserError(f"model.chat_template: {message}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.chat_template: the file {template} cannot be read: {error}") from error


def count_parameters(folder: Path) -> int | None:
    """Number of parameters in a folder's safetensors files, from their headers; None if there are none.

    A safetensors file starts with the length of its JSON header in 8 bytes, little-endian.

    Raises:
        UserError: one of them does not.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= path.stat().st_size else b""
        try:
            header = json.loads(text)
            total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"model.name: {path} is not a safetensors file, or a damaged one; download it again (a file "
                "that Git LFS left out is a few lines of text)"
            ) from error
    return total or None
