"""The emulated cluster, up once for all tests that need it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    running = Cluster()
    try:
        running.start()
        yield running
    finally:
        running.stop()
