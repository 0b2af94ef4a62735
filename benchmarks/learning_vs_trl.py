"""Does it learn what TRL learns? One recipe trained by TRL's GRPOTrainer and by ours, on several seeds each.

Rewards are shown against steps and against minutes. Runs are made one after the other, each in a process of its
own, and added to one file, so that they can be made in parts; what is in the file is not run again. Minutes are
those of the steps, without loading, and mean something only where nothing else ran beside them.

    python -m benchmarks.learning_vs_trl [--systems TRL,ours] [--seeds 0,1,2] [--steps 24] [--picture FILE]

`--picture` draws FILE.png and FILE.svg and needs matplotlib (the `bench` extra).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks._learners import Spec
from benchmarks._report import Report
from benchmarks._workers import Message, Worker, WorkerError
from grpo_cli.recipe.load import load_recipe

MODULE = "benchmarks._learners"
SYSTEMS = ("TRL", "ours")
COLORS = {"TRL": "#d1651f", "ours": "#1f6fd1"}
SPAN = 5
"""Steps of which the table shows a mean."""


@dataclass(frozen=True)
class Learned:
    """One run."""

    system: str
    seed: int
    recipe: str
    steps: list[Message]

    @property
    def rewards(self) -> list[float]:
        return [step["reward"] for step in self.steps]

    @property
    def minutes(self) -> list[float]:
        """At the end of each step."""
        total, ends = 0.0, []
        for step in self.steps:
            total += step["seconds"] / 60
            ends.append(total)
        return ends


def read(path: Path, recipe: str) -> list[Learned]:
    """The runs of a recipe in a file, the longest of each system and seed; none if it is not there."""
    longest: dict[tuple[str, int], Learned] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        one = Learned(**json.loads(line))
        known = longest.get((one.system, one.seed))
        if one.recipe == recipe and (known is None or len(known.steps) < len(one.steps)):
            longest[one.system, one.seed] = one
    return list(longest.values())


def run(system: str, seed: int, recipe: str, num_steps: int, device: str, threads: int) -> Learned:
    """Train with one system; the schedule is that of the whole recipe, also where `num_steps` ends it earlier."""
    steps: list[Message] = []
    with Worker(MODULE, asdict(Spec(system, recipe, seed, device)), threads) as worker:
        for step in range(num_steps):
            steps.append(worker.ask(step=step))
            reward, seconds = steps[-1]["reward"], steps[-1]["seconds"]
            print(f"{system}, seed {seed}, step {step + 1}: {reward:.2f} ({seconds:.1f} s)", file=sys.stderr)
    return Learned(system, seed, recipe, steps)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def spans(num_steps: int) -> list[range]:
    """The steps, SPAN at a time."""
    return [range(start, min(start + SPAN, num_steps)) for start in range(0, num_steps, SPAN)]


def table(runs: Sequence[Learned]) -> tuple[list[str], list[list[str]]]:
    """Mean rewards of each run, and of each system with the standard error over the seeds that got so far."""
    parts = spans(max(len(run.steps) for run in runs))
    columns = ["system", "seed", *(f"steps {part[0] + 1}–{part[-1] + 1}" for part in parts), "minutes"]
    rows = []
    for system in SYSTEMS:
        means = {
            one.seed: [
                statistics.fmean(one.rewards[i] for i in part) for part in parts if part[-1] < len(one.steps)
            ]
            for one in runs
            if one.system == system
        }
        for one in runs:
            if one.system == system:
                cells = [f"{mean:.1f}" for mean in means[one.seed]] + [""] * (len(parts) - len(means[one.seed]))
                rows.append([system, str(one.seed), *cells, f"{one.minutes[-1]:.1f}"])
        if len(means) > 1:
            cells = []
            for values in zip_longest(*means.values()):
                mean, error = mean_and_error([value for value in values if value is not None])
                cells.append("" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}")
            rows.append([system, "mean", *cells, *[""] * (len(parts) - len(cells)), ""])
    return columns, rows


def draw(runs: Sequence[Learned], stem: Path) -> None:
    """Reward against steps and against minutes: the mean of each system over its seeds, and each seed thinly."""
    import matplotlib.pyplot as plt

    plot: Any = plt
    figure, (by_step, by_minute) = plot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for system in SYSTEMS:
        own = [run for run in runs if run.system == system]
        if not own:
            continue
        shortest = min(len(one.steps) for one in own)
        for one in own:
            by_step.plot(range(1, len(one.steps) + 1), one.rewards, color=COLORS[system], alpha=0.4, lw=1)
            by_minute.plot(one.minutes, one.rewards, color=COLORS[system], alpha=0.4, lw=1)
        columns = list(zip(*(one.rewards[:shortest] for one in own), strict=True))
        times = list(zip(*(one.minutes[:shortest] for one in own), strict=True))
        means = [statistics.fmean(column) for column in columns]
        label = f"{system} ({len(own)} seed{'s' if len(own) > 1 else ''})"
        by_step.plot(range(1, shortest + 1), means, color=COLORS[system], lw=2, label=label)
        by_minute.plot([statistics.fmean(t) for t in times], means, color=COLORS[system], lw=2, label=label)
        if len(own) > 1:
            spread = [statistics.stdev(column) for column in columns]
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
            by_step.fill_between(range(1, shortest + 1), low, high, color=COLORS[system], alpha=0.15, lw=0)
    by_step.set(xlabel="steps", ylabel="mean reward")
    by_minute.set(xlabel="minutes", xscale="log")
    by_minute.xaxis.set_major_formatter("{x:g}")
    by_step.legend(frameon=False, loc="lower right")
    for axes in (by_step, by_minute):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    stem.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".png", ".svg"):
        figure.savefig(stem.with_suffix(ending), dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="empty: only show what is in the file")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, help="end after so many; the recipe's max_steps if not said")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/learning.jsonl"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    num_steps = options.steps or load_recipe(options.recipe).train.max_steps
    if num_steps is None:
        parser.error(f"{options.recipe} has no train.max_steps; give --steps")
    runs = read(options.results, options.recipe)
    try:
        for seed in map(int, options.seeds.split(",")):
            for system in filter(None, options.systems.split(",")):
                if any((o.system, o.seed) == (system, seed) and len(o.steps) >= num_steps for o in runs):
                    continue
                learned = run(system, seed, options.recipe, num_steps, options.device, options.threads)
                options.results.parent.mkdir(parents=True, exist_ok=True)
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(learned)) + "\n")
                runs = read(options.results, options.recipe)
    except WorkerError as error:
        sys.exit(str(error))
    if not runs:
        sys.exit(f"{options.results} has no run of {options.recipe}")
    report = Report()
    report.table(f"mean reward, {options.recipe}", *table(runs))
    report.write(options.markdown)
    if options.picture is not None:
        draw(runs, options.picture)


if __name__ == "__main__":
    main()
