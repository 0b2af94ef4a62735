"""A run over a link that fails ends right, or stops with a checkpoint from which it ends right; it never hangs.

`make links` does the same with fifty schedules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.links.harness import TIMEOUT_S, Bench
from tests.links.packets import checksum, parse, reset
from tests.links.schedules import PACKET_KINDS, RELAY_KINDS, TO_SERVER, TO_TRAINER, Script, draw

SEED = 13

FEW = {"cut": 22, "reset": 25, "broken off": 31, "gone": 29}
"""Kind that begins it to the number of a schedule that takes seconds."""


@pytest.fixture(scope="module")
def bench(vllm_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    pytest.importorskip("vllm")
    with closing(Bench(vllm_model_dir, tmp_path_factory.mktemp("links"))) as bench:
        yield bench


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_a_run_over_a_failing_link_ends_right_or_stops_with_a_checkpoint(bench: Bench, kind: str) -> None:
    case = bench.case(SEED, FEW[kind])
    assert case.schedule.faults[0].kind == kind
    if case.skipped:
        pytest.skip(case.skipped)
    assert case.begun, "nothing went wrong with the link"
    assert case.wrong is None


def test_a_schedule_follows_from_its_number_and_all_kinds_come_with_both_ways_of_transfer() -> None:
    schedules = [draw(SEED, number, TIMEOUT_S) for number in range(50)]
    assert schedules == [draw(SEED, number, TIMEOUT_S) for number in range(50)]
    first = {(schedule.faults[0].kind, schedule.transfers) for schedule in schedules}
    assert first == {(kind, way) for kind in PACKET_KINDS | RELAY_KINDS for way in ("memory", "network")}


def test_a_fault_begins_when_its_place_was_passed_so_often() -> None:
    fault = next(
        fault
        for number in range(100)
        for fault in draw(SEED, number, TIMEOUT_S).faults
        if fault.place == "generate" and fault.nth == 3
    )
    script = Script([fault])
    asked = b"POST /v1/grpo/generate HTTP/1.1\r\n"
    seen = [asked, b"GET /v1/grpo/info", asked, b"", asked, asked]
    assert [script.seen(TO_SERVER, data) for data in seen] == [[], [], [], [], [fault], []]


def test_a_forged_reset_is_a_packet_that_a_kernel_takes() -> None:
    flow = (bytes([10, 77, 0, 1]), 40000, 8000)
    for direction in (TO_SERVER, TO_TRAINER):
        packet = reset(direction, flow, 7, 9)
        segment = parse(direction, packet)
        assert segment is not None
        assert (segment.flow, segment.seq, segment.ack, segment.data) == (flow, 7, 9, b"")
        pseudo = packet[12:20] + bytes([0, packet[9], 0, 20])
        assert checksum(packet[:20]) == checksum(pseudo + packet[20:]) == 0
