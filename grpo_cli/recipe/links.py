"""Errors on the screen end with the place in the documentation that explains the key: `(docs/recipe.md:129)`.

The line is computed from the schema, as the page is. The text of an error itself has no links: what it says does
not depend on where grpo is installed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from grpo_cli.recipe.raw import RecipeError
from grpo_cli.recipe.reference import line_of

PACKAGE = Path(__file__).parents[1]


def with_links(error: RecipeError) -> str:
    """The message, each line about a key with the page and line that explain it, if the page is there."""
    page = reference_file()
    if page is None:
        return str(error)
    lines = str(error).splitlines()
    for index, key in enumerate(error.about):
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
