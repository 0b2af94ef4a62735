from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path to write a recipe to; messages call it recipe.yaml."""
    monkeypatch.chdir(tmp_path)
    return Path("recipe.yaml")
