"""A rollout of episodes with slow tools: TRL's GRPOTrainer against ours, in turns in one run.

In both the policy computes and draws every token, and then says what a script says: the same words, calls and
results, and each call takes the same time. TRL calls the tools of all episodes one after the other, and generates
the next turn of all of them together, from the beginning; ours lets an episode go on when its own answer is there.

    python -m benchmarks.episodes [--model FOLDER] [--repeats 3] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks._models import DEFAULT_MODEL
from benchmarks._report import Bar, Report
from benchmarks._scripts import Plan, Played
from benchmarks._workers import Worker

MODULE = "benchmarks._players"
SYSTEMS = ("ours", "TRL")
COLUMNS = ("system", "in turns", "seconds", "idle s", "idle", "model s", "passes", "computed", "distinct", "ratio")


def measure(options: argparse.Namespace, plan: Plan) -> dict[str, list[Played]]:
    """Rollouts of both systems in turns, after one each that is not counted.

    Raises:
        RuntimeError: the two have not played the same episodes.
    """
    rollouts: dict[str, list[Played]] = {system: [] for system in SYSTEMS}
    workers: dict[str, Worker] = {}
    try:
        for system in SYSTEMS:
            spec = {"system": system, "model": options.model, "device": "cpu", "plan": asdict(plan)}
            workers[system] = Worker(MODULE, spec, options.threads)
        for seed in range(1, options.repeats + 1):
            for system, worker in workers.items():
                played = Played(**worker.ask(seed=seed))
                rollouts[system].append(played)
                print(f"{system}: {played.seconds:.1f} s, of which {played.idle:.1f} idle", file=sys.stderr)
            if len({done[-1].digest for done in rollouts.values()}) > 1:
                raise RuntimeError("the two have not played the same episodes")
    finally:
        for worker in workers.values():
            worker.close()
    return rollouts


def median(rollouts: Sequence[Played], value: Callable[[Played], float]) -> float:
    return statistics.median(map(value, rollouts))


def row_of(system: str, rollouts: Sequence[Played]) -> list[str]:
    """Medians of a system's rollouts."""
    return [
        system,
        " ".join(f"{played.seconds:.1f}" for played in rollouts),
        f"{median(rollouts, lambda played: played.seconds):.1f}",
        f"{median(rollouts, lambda played: played.idle):.1f}",
        f"{median(rollouts, lambda played: played.idle / played.seconds):.0%}",
        f"{median(rollouts, lambda played: played.forward):.1f}",
        f"{median(rollouts, lambda played: played.passes):.0f}",
        f"{median(rollouts, lambda played: played.computed):.0f}",
        f"{median(rollouts, lambda played: played.distinct):.0f}",
        f"{median(rollouts, lambda played: played.computed / played.distinct):.3f}",
    ]


def bars_of(rollouts: dict[str, list[Played]]) -> list[Bar]:
    ours, trl = (median(rollouts[system], lambda played: played.seconds) for system in SYSTEMS)
    own = rollouts["ours"]
    computed = median(own, lambda played: played.computed / played.distinct)
    return [
        Bar("a rollout, times faster than TRL's", trl / ours, 2.0),
        Bar("engine idle, share of the rollout", median(own, lambda p: p.idle / p.seconds), 0.15, at_most=True),
        Bar("tokens computed, times the distinct ones", computed, 1.05, at_most=True),
    ]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a rollout of episodes: TRL's GRPOTrainer against ours")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--num-generations", type=int, default=4)
    parser.add_argument("--turns", type=int, default=4, help="of each episode; all but the last call a tool")
    parser.add_argument("--prompt", type=int, default=60, help="tokens of a question")
    parser.add_argument("--turn-tokens", type=int, nargs=2, default=(40, 60), help="shortest and longest turn")
    parser.add_argument("--result", type=int, default=20, help="tokens of what a tool says")
    parser.add_argument("--longest-wait", type=float, default=2.0, help="a call takes from 0 to so many seconds")
    parser.add_argument("--repeats", type=int, default=3, help="measured rollouts of each system")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    plan = Plan(
        prompts=options.prompts,
        group_size=options.num_generations,
        turns=options.turns,
        prompt=options.prompt,
        shortest=options.turn_tokens[0],
        longest=options.turn_tokens[1],
        result=options.result,
        longest_wait=options.longest_wait,
    )
    load_before = os.getloadavg()[0]
    rollouts = measure(options, plan)
    report = Report()
    title = (
        f"{options.model}: {plan.episodes} episodes of {plan.turns} turns of {plan.shortest} to {plan.longest} "
        f"tokens, calls of 0 to {plan.longest_wait:g} s, medians of {options.repeats}"
    )
    report.table(title, COLUMNS, [row_of(system, played) for system, played in rollouts.items()])
    report.lines(f"{options.threads} threads; load of the machine before: {load_before:.1f}")
    report.lines(*map(str, bars_of(rollouts)))
    report.write(options.markdown)


if __name__ == "__main__":
    main()
