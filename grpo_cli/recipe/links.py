"""Errors on the screen end with the place in the documentation that explains the key: `(docs/recipe.md:129)`.

The line is computed from the schema, as the page is. The text of an error itself has no links: what it says does
not depend on where grpo is installed.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from grpo_cli.errors import UserError
from grpo_cli.recipe.raw import RecipeError, key_path
from grpo_cli.recipe.reference import line_of

PACKAGE = Path(__file__).parents[1]


def with_links(error: UserError) -> str:
    """The message, each line about a key with the page and line that explain it, if the page is there.

    What is wrong with the world that a recipe names (`data.name: no such file`) begins with the key.
    """
    page, lines = reference_file(), str(error).splitlines()
    if page is None or not lines:
        return str(error)
    named = re.match(r"([a-z_]+(\.\w+)*): ", lines[0])
    about = error.about if isinstance(error, RecipeError) else [key_path(named[1])] if named else []
    for index, key in enumerate(about):
        if (number := line_of(key)) is not None:
            lines[index] += f" ({page}:{number})"
    return "\n".join(lines)


def reference_file() -> Path | None:
    """`docs/recipe.md` of the installed package, or of the repository; relative if below the current folder."""
    for folder in (PACKAGE, PACKAGE.parent):
        page = folder / "docs" / "recipe.md"
        if page.is_file():
            with contextlib.suppress(OSError, ValueError):  # no current folder, or not below it
                return page.relative_to(Path.cwd())
            return page
    return None
