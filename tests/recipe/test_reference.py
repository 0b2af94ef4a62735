"""The reference page is the schema's."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_cli.recipe.loss_types import LOSS_TYPES
from grpo_cli.recipe.messages import all_keys
from grpo_cli.recipe.reference import reference_page
from grpo_cli.recipe.schema import LossConfig

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "recipe.md"

DIVIDED_BY = {
    "completion_means": "tokens of its completion, then completions",
    "completions": "completions",
    "tokens": "tokens of the optimizer step",
    "longest_completions": "completions × `max_completion_tokens`",
}
"""How `docs/losses.md` says what a loss type averages over."""


def test_the_page_in_docs_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run `make docs`"


def test_every_key_is_on_the_page() -> None:
    page = reference_page()
    assert all(f"`{key[-1]}`" in page or f"`{key[-1]}." in page for key in all_keys() if len(key) > 1)


def test_a_loss_type_reads_keys_that_there_are_and_the_page_says_which() -> None:
    assert {key for row in LOSS_TYPES.values() for key in row.reads} <= LossConfig.model_fields.keys()
    page = reference_page()
    assert "Upper bound of the unclipped ratio as well (two-sided clipping). Read by `grpo`, `bnpo`, " in page
    assert f"For cispo the bound itself [{LOSS_TYPES['cispo'].epsilon_high}]." in page


def test_the_page_of_losses_has_a_row_for_each_type_that_says_what_it_averages_over() -> None:
    text, _, _ = (DOCS / "losses.md").read_text(encoding="utf-8").partition("\n\n## ")
    _, *rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| .* \|$", text, re.MULTILINE)
    assert {name: average for name, _, average in rows} == {
        name: DIVIDED_BY[row.average] for name, row in LOSS_TYPES.items()
    }
    for name, token_loss, _ in rows:
        assert (token_loss == "clipped surrogate") == (LOSS_TYPES[name].surrogate == "clipped"), name
