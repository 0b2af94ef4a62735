"""What held-out prompts say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from grpo_cli.report.curves import SUSPECTED, known, mean
from grpo_cli.report.finding import Finding
from grpo_cli.report.run import Run

FEWEST = 4
"""Evaluations from which a turn can be told from noise."""

MOST_PROMPTS = 100
"""Times as many prompts are no advice any more."""


def noise_of(values: Sequence[float]) -> float | None:
    """Standard deviation of one evaluation around a curve without kinks; None of fewer than four.

    From second differences, which a straight rise does not add to: of independent values their variance is six
    times that of a value.
    """
    if len(values) < FEWEST:
        return None
    slopes = [after - before for before, after in pairwise(values)]
    bends = [after - before for before, after in pairwise(slopes)]
    return math.sqrt(sum(bend * bend for bend in bends) / len(bends) / 6)


def overfitting(run: Run) -> Finding | None:
    """The reward rises on the prompts of training and falls on others."""
    steps, values = run.points("eval_reward")
    noise = noise_of(values)
    if noise is None:
        return None
    pairs = [(before + after) / 2 for before, after in pairwise(values)]
    best = max(range(len(pairs)), key=pairs.__getitem__)
    drop = pairs[best] - pairs[-1]
    turn = steps[best + 1]
    train = known(row.get("reward") for row in run.rows if row["step"] > turn)
    before = known(row.get("reward") for row in run.rows if row["step"] <= turn)
    rises = bool(train and before) and (mean(train) or 0.0) > (mean(before) or 0.0)
    # Means of two evaluations differ by chance by as much as one does.
    if not drop > SUSPECTED * noise or not drop > 0.2 * (max(values) - min(values)) or not rises:
        return None
    return Finding(
        "overfitting",
        0.65,
        f"The reward on held-out prompts fell from {pairs[best]:.3g} around step {turn} to {pairs[-1]:.3g}, "
        f"while that of training rose to {mean(train) or 0.0:.3g}; one evaluation is exact to {noise:.2g}.",
        "What is learned now holds for the prompts of training only, or is a trick of their rewards.",
        f"Set train.max_steps: {turn}; for more than that, more prompts in data, or loss.beta: "
        f"{4 * run.recipe.loss.beta or 0.04:g}.",
        (turn, run.rows[-1]["step"]),
    )


def evaluation_missing(run: Run) -> Finding | None:
    """Nothing says how it does on prompts that it was not trained on."""
    steps, _ = run.points("eval_reward")
    if len(steps) >= 2:
        return None
    every = max(1, (run.recipe.train.max_steps or 10 * len(run.rows)) // 10)
    missing = "" if run.recipe.data.eval is not None else "name held-out prompts in data.eval, and "
    seen = (
        "Held-out prompts were never tried." if not steps else f"There was one evaluation, after step {steps[0]}."
    )
    return Finding(
        "evaluation_missing",
        0.15 if not steps else 0.1,
        seen,
        "Whether it has learned the task or its training prompts cannot be told"
        + ("." if not steps else ": there is nothing before to compare with."),
        f"For a run that shall show something, {missing}set train.eval_every: {every}.",
    )


def evaluation_noisy(run: Run) -> Finding | None:
    """The evaluations differ by less than chance would make them."""
    _, values = run.points("eval_reward")
    spread = mean(run.series("eval_reward_std"))
    prompts = run.recipe.data.eval.limit if run.recipe.data.eval is not None else None
    if len(values) < 2:
        return None
    noise = noise_of(values)
    if spread is not None and prompts is not None:
        # Completions of a prompt are alike, so it is prompts that count.
        noise = max(noise or 0.0, spread / math.sqrt(prompts))
    difference = abs(values[-1] - values[0])
    if not noise or difference >= SUSPECTED * math.sqrt(2) * noise:
        return None
    more = "more prompts in data.eval"
    times = SUSPECTED * math.sqrt(2) * noise / difference if difference > 0 else math.inf
    if prompts is not None and times * times <= MOST_PROMPTS:
        more = f"data.eval.limit: {math.ceil(prompts * times * times)}"
    return Finding(
        "evaluation_noisy",
        0.1,
        f"From the first evaluation to the last the reward went from {values[0]:.3g} to {values[-1]:.3g}, and "
        f"one is exact to {noise:.2g} (standard error).",
        "Whether it has learned cannot be told from them.",
        f"For a difference of this size: {more}.",
    )
