from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.raw import RecipeError
from grpo_cli.recipe.schema import Recipe

PLAIN = """\
model:
  name: m
data:
  name: d.jsonl
rewards:
  - my:score
train:
  output_dir: run
  max_steps: 2
"""
"""What a test appends begins at line 10."""


def load(file: Path, text: str, *overrides: str) -> Recipe:
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides)


def errors(file: Path, text: str | bytes, *overrides: str) -> list[str]:
    """The lines of the message that a recipe ends in."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return str(caught.value).splitlines()


def plain(**sections: Any) -> dict[str, Any]:
    return yaml.safe_load(PLAIN) | sections
