"""What tests of faults share: runs of a system that were made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.faults.harness import Bench


@pytest.fixture(scope="session")
def bench(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """Gives the bench of a system, with its undisturbed run."""
    return cache(lambda system: Bench(system, tiny_model_dir, tmp_path_factory.mktemp("bench")))
