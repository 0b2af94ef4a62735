"""`module:name` to the object it names: the one way in which a recipe reaches Python code."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from typing import Any

from grpo_cli.errors import UserError


def load_object(path: str, *, setting: str) -> Any:
    """Import the object at `module:name` (`module:Class.method` works too); the current folder is searched first.

    Args:
        path: dotted path with one colon.
        setting: where it was written, for messages: `rewards.0`.

    Raises:
        UserError: the path is malformed, there is no such module or name, or the module fails when imported.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"{setting}: {path!r} is not of the form module:name, such as rewards.length:reward_len")
    here = os.getcwd()
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise UserError(
                f"{setting}: there is no module {module_name!r} in {here} or among the installed packages"
            ) from error
        raise UserError(f"{setting}: {module_name} needs {error.name}, which is not installed") from error
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` may call exit()
        raise UserError(f"{setting}: importing {module_name} failed: {origin(error)}") from error
    for part in name.split("."):
        if not hasattr(target, part):
            close = difflib.get_close_matches(part, dir(target), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{setting}: {module_name} has no {name}{hint}")
        target = getattr(target, part)
    return target


def origin(error: BaseException, *, below: str | None = None) -> str:
    """`file:line: Type: message` of where the error was raised.

    Args:
        error: the error.
        below: a file of ours that called other people's code: the place is the line in that code which it
            called, not the library's line where that ended; none if the call itself failed.
    """
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    message = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    if below is None:
        frame = frames[-1]
    else:
        called = [frame for frame, caller in zip(frames[1:], frames, strict=False) if caller.filename == below]
        if not called:
            return message
        frame = called[-1]
    return f"{frame.filename}:{frame.lineno}: {message}"
