"""The reference page is the schema's."""

from __future__ import annotations

from pathlib import Path

from grpo_cli.recipe.messages import all_keys
from grpo_cli.recipe.reference import reference_page

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_the_page_in_docs_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run `make docs`"


def test_every_key_is_on_the_page() -> None:
    page = reference_page()
    assert all(f"`{key[-1]}`" in page or f"`{key[-1]}." in page for key in all_keys() if len(key) > 1)
