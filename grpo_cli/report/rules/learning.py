"""Whether the run has learned, and whether its learning rate let it."""

from __future__ import annotations

import math
from itertools import pairwise

from grpo_cli.report.curves import SURE, Change, change, latest, mean
from grpo_cli.report.finding import Finding
from grpo_cli.report.run import Run

LONG_ENOUGH = 20
"""Steps before a reward that does not move is a sign. The guessing game's needs 10 to rise by three standard
errors, the quickstart's 8."""

ENTROPY_JUMP = 0.5
"""Share of the first step's entropy that it changes by from one step to the next: in the quickstart by 0.16 at
most, in the guessing game by 0.29."""

REWARD_DROP = 3.0
"""Standard deviations of single completions by which their mean falls from one step to the next: in the quickstart
by 0.4 at most, in the guessing game by 1.8."""

STILL = 0.03
"""Share of its entropy by which a policy may change that has not moved."""

SMALL_KL = 1e-3
"""Nats a token under which a policy is still the one that it started as."""


def reward_change(run: Run) -> Change | None:
    return change(run.series("reward"))


def has_learned(run: Run) -> bool:
    """Whether the reward rose for sure.

    It ends above its very first step, and what it ends above for sure is that one or the mean of the first steps:
    of a run that rose at once these are so different that their mean says little, and one that fell at once and
    came back has not learned.
    """
    reward = reward_change(run)
    first, spread = (run.rows[0].get(name) if run.rows else None for name in ("reward", "reward_std"))
    if reward is None or first is None:
        return False
    # Completions of one prompt are alike, so it is prompts that count.
    of_first = (spread or 0.0) * (spread or 0.0) / run.recipe.train.prompts_per_step
    gain = reward.last - first
    is_above = gain > math.sqrt(of_first)
    is_sure = spread is not None and gain >= SURE * math.sqrt(of_first + reward.last_error * reward.last_error)
    return is_above and (reward.rose or is_sure)


def reward_fell(run: Run) -> Finding | None:
    """The mean reward went down."""
    reward, recipe = reward_change(run), run.recipe
    if reward is None or not reward.fell:
        return None
    advice = [f"Lower optim.learning_rate from {_rate(run)} to {_rate(run, 0.1)}"]
    if recipe.train.num_iterations * recipe.train.optimizer_steps_per_rollout > 1:
        advice.append("set train.num_iterations: 1 and train.optimizer_steps_per_rollout: 1")
    if recipe.generation.engine != "transformers" and recipe.loss.sampler_correction is None:
        advice.append("set loss.sampler_correction: {}")
    return Finding(
        "reward_fell",
        0.8,
        f"The mean reward fell {reward}, by {-reward.in_errors:.1f} standard errors.",
        "The updates do harm: they are too large, or what they are computed from is not what the policy said.",
        ", or ".join(advice) + ".",
    )


def learning_rate_too_high(run: Run) -> Finding | None:
    """The policy became another one from one step to the next."""
    reward, paid = reward_change(run), has_learned(run)
    # Of a policy that learns, some prompts' entropies are small and others' not yet, so that the mean jumps.
    seen = _reward_drop(run) or (None if paid else _entropy_jump(run))
    if seen is None or reward is None:
        return None
    shown, step = seen
    return Finding(
        "learning_rate_too_high",
        0.9 if paid else 0.97,
        f"{shown} between steps {step} and {step + 1}; over the run the mean reward went {reward}.",
        "One update made another policy of it: the steps are larger than what the gradient is true for"
        + (", even if the reward rose in the end." if paid else "."),
        f"Lower optim.learning_rate from {_rate(run)} to {_rate(run, 0.1)}, and to {_rate(run, 0.01)} if that "
        "does the same; start again from the first model, since this one is spoilt.",
        (step, step + 1),
    )


def _entropy_jump(run: Run) -> tuple[str, int] | None:
    """The largest change of the entropy from a step to the next, if it is one of another policy, and that step."""
    steps, entropies = run.points("entropy")
    if not entropies or not entropies[0] > 0:
        return None
    jumps = [
        (abs(after - before) / entropies[0], step, before, after)
        for (step, before), (later, after) in pairwise(zip(steps, entropies, strict=True))
        if later == step + 1
    ]
    jump, step, before, after = max(jumps, default=(0.0, 0, 0.0, 0.0))
    if not ENTROPY_JUMP <= jump < math.inf:
        return None
    return f"The entropy went from {before:.3g} to {after:.3g} nats, by {jump:.0%} of what it began with,", step


def _reward_drop(run: Run) -> tuple[str, int] | None:
    """The first fall of the mean reward from a step to the next that is too much for one update of a policy."""
    usual = mean(run.series("reward_std")) or 0.0
    for row, after in pairwise(run.rows):
        before, spread, later = row.get("reward"), row.get("reward_std"), after.get("reward")
        if before is None or spread is None or later is None or after["step"] != row["step"] + 1:
            continue
        drop, unit = before - later, max(spread, usual)
        if unit > 0 and REWARD_DROP * unit <= drop < math.inf:
            times = f"{drop / unit:.1f} standard deviations of a completion,"
            return f"The mean reward fell from {before:.3g} to {later:.3g}, {times}", row["step"]
    return None


def learning_rate_too_low(run: Run) -> Finding | None:
    """Neither reward nor policy moved, though the groups had a spread to learn from."""
    reward, entropy = reward_change(run), change(run.series("entropy"))
    flat, kl = latest(run.series("frac_reward_zero_std")), latest(run.series("kl"))
    if len(run.rows) < LONG_ENOUGH or reward is None or entropy is None or not reward.stayed:
        return None
    if learning_rate_too_high(run) is not None:
        return None  # it jumped at first, and has not moved since
    has_spread = flat is None or flat < 0.9
    length = change(run.series("completions/mean_length"))
    moved = abs(entropy.last - entropy.first) > STILL * abs(entropy.first) and not entropy.stayed
    grew = length is not None and not length.stayed
    if moved or grew or not has_spread or (kl is not None and kl > SMALL_KL):
        return None
    distance = "loss.beta is 0, so the KL is not known" if kl is None else f"the KL is {kl:.2g} nats a token"
    vanishes = run.recipe.model.dtype == "bfloat16" and run.recipe.optim.learning_rate < 1e-5
    return Finding(
        "learning_rate_too_low",
        0.6,
        f"After {len(run.rows)} steps the reward is where it was ({reward}), and so are the entropy ({entropy}) "
        f"and the length; {distance}.",
        "The policy is still the model that it started as: the updates are too small"
        + (", and in bfloat16 most of them are rounded away." if vanishes else ", or too few."),
        f"Raise optim.learning_rate from {_rate(run)} to {_rate(run, 10)}"
        + ("; set model.dtype: float32, or train an adapter with model.lora." if vanishes else "."),
    )


def _rate(run: Run, factor: float = 1) -> str:
    return f"{run.recipe.optim.learning_rate * factor:.3g}"
