"""A run that is killed at any moment, by anything, and resumed ends with the bytes of the undisturbed one.

`make faults` does the same a thousand times. A run on a vLLM server is hit in test_server_kills.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.harness import SERVED, SYSTEMS, Bench
from tests.faults.points import KILLS, POINTS

pytestmark = pytest.mark.slow

SEED = 17

LEAST_FAULTS = 60

CASES = {"one process": 24, "adapter with dropout": 6, "bfloat16": 3, "episodes": 4, "ddp": 2, "zero3": 2}
"""Runs of each system; the first one's go through all points once but those of environments."""


def test_a_run_killed_anywhere_ends_with_the_same_bytes(bench: Callable[[str], Bench]) -> None:
    cases = [bench(system).case(SEED, number) for system, count in CASES.items() for number in range(count)]
    wrong = [f"{case.name}\n{'; '.join(map(str, case.faults))}\n{case.wrong}" for case in cases if case.wrong]
    assert not wrong, "\n\n".join(wrong)
    faults = [fault for case in cases for fault in case.faults]
    assert len(faults) >= LEAST_FAULTS
    assert {fault.point for fault in faults} == POINTS.keys()
    assert {fault.by for fault in faults} == set(KILLS)
    assert CASES.keys() == SYSTEMS.keys() - {SERVED}
