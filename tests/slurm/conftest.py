"""The emulated cluster, up for the tests of one module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    running = Cluster()
    try:
        running.start()
        yield running
    finally:
        running.stop()
