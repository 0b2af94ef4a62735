"""A few hundred requests, good, wrong, slow and abandoned, while weights change. `make load` sends 10,000."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.load.run import report_lines, run, serve_tiny


@pytest.mark.slow
def test_every_request_is_answered_by_the_right_weights_and_nothing_is_left_over(tmp_path: Path) -> None:
    with serve_tiny(tmp_path) as (server, model):
        report = run(server, model, requests=320, clients=40, updates=16, seed=1, rounds=8)
    assert not report.failures, "\n".join(report_lines(report))
    tally, verdict = report.tally, report.verdict
    assert tally.answered.total() + tally.left.total() == 320
    assert tally.left, "some clients leave"
    assert tally.resent, "some requests meet an update"
    assert tally.broken_updates
    assert verdict.told_apart > 0.99 * verdict.completions > 200, "other weights would have been noticed"
