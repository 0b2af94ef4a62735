"""Nothing grows over 200 steps of a run in which every feature is on. `make soak` runs 2,000."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 200

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_memory_files_threads_and_children_stay_as_they_are() -> None:
    # In a process of its own, in which no other test has left anything.
    command = [sys.executable, "-m", "tests.soak", "--steps", str(STEPS)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
