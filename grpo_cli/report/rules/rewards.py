"""Whether the rewards say anything from which one can learn."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_cli.report.curves import change, known, latest, mean
from grpo_cli.report.finding import Finding
from grpo_cli.report.rules.learning import has_learned
from grpo_cli.report.run import Run

ENOUGH_SCORED = 32
"""Completions after which a reward that has always been the same is no accident: one that is earned once in ten
times would have been earned with a probability of 97 %."""

FLAT_GROUPS = 0.5
"""Share of groups without spread from which most of the generation is for nothing. DAPO (arXiv:2503.14476) drops
such groups."""

DROWNED = 0.05
"""Share of the spread below which a reward function does not decide who is better in a group."""


def constant_reward(run: Run) -> Finding | None:
    """A reward function has always returned the same, or None."""
    completions = len(run.rows) * run.recipe.train.prompts_per_step * run.group_size
    if completions < ENOUGH_SCORED or len(run.rows) < 2:
        return None
    for name, weight in zip(run.reward_names, _weights(run), strict=True):
        if weight == 0:
            continue  # it is only logged
        means, spreads = (known(run.series(f"rewards/{name}/{part}")) for part in ("mean", "std"))
        tolerance = 1e-6 * max((abs(value) for value in means), default=0)
        if max(spreads, default=0) > tolerance or max(means, default=0) - min(means, default=0) > tolerance:
            continue
        only = len(run.reward_names) == 1
        said = f"returned {means[0]:.3g} for each" if means else "has not scored any"
        return Finding(
            "constant_reward",
            1.0 if only else 0.5,
            f"The reward {name} {said} of {completions} completions in {len(run.rows)} steps.",
            "It never tells two completions apart, so "
            + ("there is nothing to learn from." if only else "it has no part in what is learned."),
            f"See what it is given and says: grpo sample RECIPE -n 4. If it works and {name} is too seldom "
            "earned, give part of the reward for part of the way, or start with prompts that the model can "
            "already do at times.",
        )
    return None


def no_spread(run: Run) -> Finding | None:
    """In most groups all completions got the same reward, so there is no gradient."""
    flat = change(run.series("frac_reward_zero_std"))
    if flat is None or flat.last < FLAT_GROUPS:
        return None
    kept = run.recipe.loss.drop_zero_variance_groups
    resample = "" if kept == "resample" else "loss.drop_zero_variance_groups: resample, or "
    more = f"generation.num_generations: {2 * run.group_size}"
    if has_learned(run):
        badness, meaning = (
            0.3,
            "These prompts are solved, or the policy says the same to each: little is left to learn.",
        )
        advice = f"Harder prompts; {resample}stop here."
    elif flat.first < FLAT_GROUPS:
        badness = 0.6 * min(flat.last, 1.0)
        meaning = (
            "The groups had a spread and lost it, without a gain: the policy does not try other things any more."
        )
        advice = f"A lower optim.learning_rate, loss.entropy_coef: 0.001, or generation.temperature: 1.0; {more}."
    else:
        badness = 0.95 * min(flat.last, 1.0)
        meaning = "The prompts are too hard or too easy for the model, or the reward has too few values."
        advice = f"Prompts that it does at times, a reward for part of the way; {resample}{more}."
    shown = (
        f"In {flat.last:.0%} of the groups of the last {flat.span} steps all {run.group_size} rewards were equal"
    )
    return Finding("no_spread", badness, f"{shown} ({flat.first:.0%} in the first).", meaning, advice)


def _weights(run: Run) -> list[float]:
    """Of `run.reward_names`. The reward of an environment comes last, with a weight of 1."""
    weights = [reward.weight for reward in run.recipe.rewards][: len(run.reward_names)]
    return weights + [1.0] * (len(run.reward_names) - len(weights))


def drowned_reward(run: Run) -> Finding | None:
    """One reward function decides alone, beside others that vary, too, and are not learned all the same."""
    names = run.reward_names
    if len(names) < 2 or run.recipe.loss.aggregation == "normalize_then_sum":
        return None
    weights = _weights(run)
    spreads = [mean(run.series(f"rewards/{name}/std")) or 0.0 for name in names]
    parts = [abs(weight) * spread for weight, spread in zip(weights, spreads, strict=True)]
    loud = max(range(len(names)), key=parts.__getitem__)
    varying = [
        place
        for place, name in enumerate(names)
        if place != loud and parts[place] > 0 and not _rose(run.series(f"rewards/{name}/mean"))
    ]
    if not varying:
        return None
    quiet = min(varying, key=parts.__getitem__)
    share = parts[quiet] / sum(parts)
    if not share < DROWNED:
        return None
    balanced = weights[loud] * parts[quiet] / parts[loud]
    place = f"rewards.{loud}.weight" if loud < len(run.recipe.rewards) else f"the weight of {names[loud]}"
    return Finding(
        "drowned_reward",
        0.4 if abs(weights[quiet]) >= abs(weights[loud]) else 0.2,  # else somebody has weighed it less
        f"{names[loud]} makes {parts[loud] / sum(parts):.1%} of the spread of the rewards (weight times standard "
        f"deviation over a step), {names[quiet]} {share:.2g} of it.",
        f"Who is better in a group is decided by {names[loud]}; {names[quiet]} hardly counts.",
        f"Set {place} to {balanced:.2g}, which makes both count alike, or loss.aggregation: "
        "normalize_then_sum in place of loss.scale_rewards.",
    )


def _rose(values: Sequence[float | None]) -> bool:
    course = change(values)
    return course is not None and course.rose


def skipped_groups(run: Run) -> Finding | None:
    """Groups had no gradient though their rewards differed: all of their completions were left out."""
    skipped, flat = latest(run.series("frac_groups_skipped")), latest(run.series("frac_reward_zero_std"))
    if skipped is None or min(skipped, skipped - (flat or 0)) < 0.25:
        return None
    return Finding(
        "skipped_groups",
        min(0.9, skipped),
        f"{skipped:.0%} of the groups of the last steps were not trained on, and only {flat or 0:.0%} for equal "
        "rewards.",
        "Their completions were left out as a whole: cut off under loss.mask_truncated, or lost with their "
        "environment.",
        "Raise generation.max_completion_tokens, or set loss.mask_truncated: false; for lost ones see the notes "
        "on the screen of the run.",
    )
