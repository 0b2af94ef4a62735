"""A run on a vLLM server of its own ends as the undisturbed one, whichever of its processes is killed.

`python -m tests.faults --system vllm_server` does so at as many points as it is told. Servers start slowly.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.harness import SERVED, Bench
from tests.faults.points import KILLS, SERVER_KILLS

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SEED = 31

CASES = (0, 6)
"""In the one the trainer is hit, in the other its server."""


def test_a_run_ends_the_same_whether_its_trainer_or_its_server_is_killed(bench: Callable[[str], Bench]) -> None:
    cases = [bench(SERVED).case(SEED, number) for number in CASES]
    wrong = [f"{case.name}\n{'; '.join(map(str, case.faults))}\n{case.wrong}" for case in cases if case.wrong]
    assert not wrong, "\n\n".join(wrong)
    hit = {fault.by for case in cases for fault in case.faults}
    assert hit & set(KILLS)
    assert hit & set(SERVER_KILLS)
