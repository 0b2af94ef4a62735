"""What tests of faults share: runs of a system that were made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.faults.harness import SERVED, Bench


@pytest.fixture(scope="session")
def bench(
    tiny_model_dir: Path, vllm_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bench]:
    """Gives the bench of a system, with its undisturbed run."""

    def make(system: str) -> Bench:
        model = vllm_model_dir if system == SERVED else tiny_model_dir
        return Bench(system, model, tmp_path_factory.mktemp("bench"))

    return cache(make)
