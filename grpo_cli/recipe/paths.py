"""Names of files that a recipe may have in it."""

from __future__ import annotations

from pathlib import Path

from grpo_cli.recipe.raw import is_pipe_or_device

LONGEST_FILE_NAME = 255
"""Bytes, on the file systems of Linux and macOS."""


def possible_path(text: str | None) -> str | None:
    """Return `text` if a file can have that name, so that looking for it cannot fail in odd ways.

    Raises:
        ValueError: no file can.
    """
    if text is None:
        return None
    if "\0" in text:
        raise ValueError("have no null character in it")
    if any(len(part.encode(errors="surrogateescape")) > LONGEST_FILE_NAME for part in text.split("/")):
        raise ValueError(f"have at most {LONGEST_FILE_NAME} bytes between two slashes")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError("begin with the home folder of a user of this machine, or have no ~") from error
    if is_pipe_or_device(path):
        raise ValueError("name a file or a folder, not a pipe or a device")
    return text
