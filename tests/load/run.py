"""A whole load: rounds of requests, after each of which the server is measured at rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import byte_tokenizer, tiny_llama
from tests.integration.serving import Serve
from tests.load.content import Verdict, judge
from tests.load.drive import Load, Tally, schedule
from tests.load.requests import KINDS, MAX_MODEL_LEN
from tests.load.resources import ABANDONED, MEASURES, abandon, measure, settle
from tests.soak.growth import Trend, table, trend

ROUNDS = 16

LEFT_BEHIND = 0.2
"""Most that may be generated of what nobody waits for any longer."""


@dataclass(frozen=True)
class Report:
    tally: Tally
    verdict: Verdict
    trends: list[Trend]
    left_behind: float
    """Share of the tokens that abandoned requests had asked for, which were generated all the same."""
    seconds: float
    rounds: int

    @property
    def failures(self) -> list[str]:
        grown = [f"{found.measure.name} grew" for found in self.trends if found.grows]
        kept_on = [f"{self.left_behind:.0%} of what nobody waited for"] if self.left_behind > LEFT_BEHIND else []
        return self.tally.failures + self.verdict.wrong + grown + kept_on


def run(
    server: Serve,
    model: Any,
    *,
    requests: int,
    clients: int,
    updates: int,
    seed: int,
    rounds: int,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Load the server.

    Args:
        server: a running one.
        model: of the folder that it serves.
        requests: in all.
        clients: at once.
        updates: of the weights, in all.
        seed: of the schedule.
        rounds: at least eight; the first quarter of them warms the server up.
        note: told what was measured after each round.
    """
    load = Load(server, model)
    jobs = schedule(seed, requests)
    left_behind: list[float] = []
    rows = np.zeros((rounds, len(MEASURES)))

    async def in_rounds() -> None:
        await load.update()
        for index in range(rounds):
            part = jobs[index * requests // rounds : (index + 1) * requests // rounds]
            of_round = (index + 1) * updates // rounds - index * updates // rounds
            await load.run(part, clients, of_round)
            settle(server)  # nothing else is to be done meanwhile
            rows[index] = measure(server)
            note(f"round {index + 1} of {rounds}, {time.monotonic() - start:.0f} s: {rows[index].astype(int)}")
        left_behind.append(await abandon(server))

    start = time.monotonic()
    asyncio.run(in_rounds())
    seconds = time.monotonic() - start
    load.close()
    trends = [trend(what, rows[:, index]) for index, what in enumerate(MEASURES)]
    return Report(load.tally, judge(load.tally.completions, model), trends, left_behind[0], seconds, rounds)


@contextmanager
def serve_tiny(folder: Path) -> Iterator[tuple[Serve, Any]]:
    """A server of a tiny model, and the model."""
    model = tiny_llama(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=MAX_MODEL_LEN
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    # oneDNN keeps the kernels of the last 1,024 shapes, half a gigabyte that a load fills little by little.
    server = Serve(folder, environment={"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"})
    try:
        yield server.wait_ready(), model
    finally:
        server.stop()


def report_lines(report: Report) -> list[str]:
    """Markdown."""
    tally, verdict = report.tally, report.verdict
    lines = [
        "| request | answered as expected | sent again, for an update | client left | slowest, s |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        counts = tally.answered[kind], tally.resent[kind], tally.left[kind]
        lines.append(f"| {kind} | {' | '.join(f'{count:,}' for count in counts)} | {tally.slowest_s[kind]:.1f} |")
    totals = tally.answered.total(), tally.resent.total(), tally.left.total()
    lines.append(f"| all | {' | '.join(f'{count:,}' for count in totals)} | {max(tally.slowest_s.values()):.1f} |")
    lines += ["", ", ".join(f"{manner}: {count:,}" for manner, count in sorted(tally.manners.items()))]
    lines += [
        "",
        f"{tally.updates} updates, {tally.broken_updates} of them after one that failed; "
        f"at most {tally.most_at_once} clients at once; {report.seconds:.0f} s",
        f"{verdict.completions:,} completions, largest difference from their version {verdict.largest:.1e}; "
        f"{verdict.told_apart:,} are not of a neighbouring one",
        f"of the tokens of {ABANDONED} long requests whose clients left, {report.left_behind:.1%} were generated",
        "",
        *table(report.trends, report.rounds),
        "",
        *(f"FAILED: {failure}" for failure in report.failures[:50]),
        f"{len(report.failures)} failures",
    ]
    return lines
