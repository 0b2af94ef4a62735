"""A run in words, in the terminal: what it was, whether it learned, where its time went, what looks wrong."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_cli.report.curves import change, known, latest
from grpo_cli.report.finding import Finding
from grpo_cli.report.findings import WORTH_TELLING, find
from grpo_cli.report.run import Run
from grpo_cli.report.sparkline import sparkline
from grpo_cli.report.terminal import printable, visible

CURVES = {
    "reward": "reward",
    "eval_reward": "held-out reward",
    "entropy": "entropy, nats",
    "kl": "KL to the reference, nats",
    "completions/mean_length": "length, tokens",
    "completions/clipped_ratio": "cut off",
    "frac_reward_zero_std": "groups without spread",
    "grad_norm": "gradient norm",
    "time/step": "seconds a step",
}
"""Metrics that are drawn, those of them that a run has, and what they are called."""

SPARK_WIDTH = 40
"""Characters of a curve: with its name and two numbers, a line of 80."""

SEVERE = 0.7
"""Badness from which on a finding is red; one that is worth telling is yellow."""


def print_report(runs: Sequence[Run], console: Console) -> None:
    """Print what is known of runs, one after the other; several are compared in a table first."""
    if len(runs) > 1:
        console.print(_comparison(runs))
    for run in runs:
        _print_run(run, console)


def _comparison(runs: Sequence[Run]) -> Table:
    table = Table(title="runs")
    for column in ("run", "steps", "reward, first", "reward, last", "error", "held-out", "seconds a step"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in runs:
        reward, seconds = change(run.series("reward")), latest(run.series("time/step"))
        _, held_out = run.points("eval_reward")
        ends = ("–", "–") if reward is None else (reward.first, reward.last)
        error = "–" if reward is None or reward.span == 1 else reward.error
        numbers = (*ends, error, held_out[-1] if held_out else "–", "–" if seconds is None else seconds)
        shown = [number if isinstance(number, str) else f"{number:.3g}" for number in numbers]
        table.add_row(printable(run.name), str(len(run.rows)), *shown)
    return table


def _print_run(run: Run, console: Console) -> None:
    console.print(f"\n[bold]{printable(run.name)}[/bold]  {printable(_what_it_is(run))}", highlight=False)
    for line in _learned(run):
        console.print(line, highlight=False)
    console.print(_curves(run))
    times = _times(run)
    if times:
        console.print(times, highlight=False)
    findings = find(run)
    console.print(f"\n[bold]Findings[/bold], worst first: {len(findings) or 'none'}", highlight=False)
    for finding in findings:
        _print_finding(finding, console)


def _what_it_is(run: Run) -> str:
    recipe = run.recipe
    rewards = ", ".join(run.reward_names) or "no rewards yet"
    steps = f"{run.steps[-1]} of {recipe.train.max_steps}" if recipe.train.max_steps else str(run.steps[-1])
    state = "finished" if run.is_finished else "not finished"
    return (
        f"{recipe.model.name} on {recipe.data.name or 'prompts of its environment'}, rewarded by {rewards}; "
        f"{recipe.train.prompts_per_step} prompts x {run.group_size} completions a step, {recipe.loss.type}, "
        f"learning rate {recipe.optim.learning_rate:.3g}; step {steps}, {state}"
    )


def _learned(run: Run) -> list[str]:
    """Sentences on the reward, in training and on held-out prompts."""
    reward = change(run.series("reward"))
    if reward is None:
        return ["Less than two steps have a reward, which says nothing about learning."]
    difference = f"{reward.last - reward.first:+.3g}"
    if reward.span == 1:  # of which no error is known
        verdict = "So few steps say nothing about learning"
    else:
        difference += f" with a standard error of {reward.error:.2g}"
        verdict = "It rose" if reward.rose else "It fell" if reward.fell else "Chance alone might do as much"
    steps, values = run.points("eval_reward")
    held_out = "Held-out prompts were not tried."
    if values:
        held_out = f"On held-out prompts it was {values[-1]:.3g} after step {steps[-1]}"
        held_out += f", {values[0]:.3g} after step {steps[0]}." if len(values) > 1 else "."
    return [f"The mean reward went {reward}, {difference}. {verdict}.", held_out]


def _curves(run: Run) -> Table:
    table = Table.grid(padding=(0, 2))
    for metric, label in CURVES.items():
        _, values = run.points(metric)
        if values:
            first, last = f"{values[0]:.3g}", f"{values[-1]:.3g}"
            table.add_row(label, sparkline(values, SPARK_WIDTH), f"{first} → {last}")
    return table


def _times(run: Run) -> str:
    """Share of each phase in the time of all steps."""
    whole = sum(known(run.series("time/step")))
    names = [
        name for name in run.metric_names if name.startswith("time/") and name not in ("time/step", "time/eval")
    ]
    sums = {name.removeprefix("time/"): sum(known(run.series(name))) for name in names}
    if not whole > 0 or not sums:
        return ""
    parts = sorted(sums.items(), key=lambda item: -item[1])
    return f"time: {', '.join(f'{phase} {seconds / whole:.0%}' for phase, seconds in parts)} of {whole:.3g} s"


def _print_finding(finding: Finding, console: Console) -> None:
    colour = "red" if finding.badness >= SEVERE else "yellow" if finding.badness >= WORTH_TELLING else "dim"
    console.print(f"[{colour}]{finding.badness:.2f}[/{colour}] [bold]{finding.rule}[/bold]", highlight=False)
    for text in (finding.figure, finding.meaning, finding.advice):
        console.print(Padding(Text(visible(text)), (0, 0, 0, 5)))
