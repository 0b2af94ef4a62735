"""Whether the run has learned, and whether its learning rate let it."""

from __future__ import annotations

from itertools import pairwise

from grpo_cli.report.curves import Change, change, known, latest
from grpo_cli.report.finding import Finding
from grpo_cli.report.run import Run

LONG_ENOUGH = 20
"""Steps before a reward that does not move is a sign. The quickstart's needs 10 to rise by three standard
errors."""

ENTROPY_JUMP = 0.5
"""Share of the first step's entropy that it changes by from one step to the next. The runs of ours that learned
changed it by 0.29 at most."""

STILL = 0.03
"""Share of its entropy by which a policy may change that has not moved."""

SMALL_KL = 1e-3
"""Nats a token under which a policy is still the one that it started as."""


def reward_change(run: Run) -> Change | None:
    return change(run.series("reward"))


def has_learned(run: Run) -> bool:
    """Whether the reward rose for sure."""
    reward = reward_change(run)
    return reward is not None and reward.rose


def reward_fell(run: Run) -> Finding | None:
    """The mean reward went down."""
    reward = reward_change(run)
    if reward is None or not reward.fell:
        return None
    return Finding(
        "reward_fell",
        0.8,
        f"The mean reward fell {reward}, by {-reward.in_errors:.1f} standard errors.",
        "The updates do harm: they are too large, or what they are computed from is not what the policy said.",
        f"Lower optim.learning_rate from {_rate(run)} to {_rate(run, 0.1)}; with optimizer_steps_per_rollout or "
        "num_iterations above 1, set them to 1; if another engine samples, set loss.sampler_correction: {}.",
    )


def learning_rate_too_high(run: Run) -> Finding | None:
    """The policy became another one from one step to the next, and its reward did not gain by it."""
    steps, entropies = run.points("entropy")
    if len(known(entropies)) < len(entropies) or len(entropies) < 2 or entropies[0] <= 0 or has_learned(run):
        return None
    jumps = [abs(after - before) / entropies[0] for before, after in pairwise(entropies)]
    largest = max(range(len(jumps)), key=jumps.__getitem__)
    if jumps[largest] < ENTROPY_JUMP:
        return None
    before, after = entropies[largest], entropies[largest + 1]
    return Finding(
        "learning_rate_too_high",
        0.97,
        f"The entropy went from {before:.3g} to {after:.3g} nats between steps {steps[largest]} and "
        f"{steps[largest + 1]}, {jumps[largest]:.0%} of what it began with, and the reward did not rise.",
        "One update made another policy of it: the steps are larger than what the gradient is true for.",
        f"Lower optim.learning_rate from {_rate(run)} to {_rate(run, 0.1)}, and to {_rate(run, 0.01)} if that "
        "does "
        "the same; start again from the first model, since this one is spoilt.",
        (steps[largest], steps[largest + 1]),
    )


def learning_rate_too_low(run: Run) -> Finding | None:
    """Neither reward nor policy moved, though the groups had a spread to learn from."""
    reward, entropy = reward_change(run), change(run.series("entropy"))
    flat, kl = latest(run.series("frac_reward_zero_std")), latest(run.series("kl"))
    if len(run.rows) < LONG_ENOUGH or reward is None or entropy is None or not reward.stayed:
        return None
    has_spread = flat is None or flat < 0.9
    moved = abs(entropy.last - entropy.first) > STILL * abs(entropy.first) and not entropy.stayed
    if moved or not has_spread or (kl is not None and kl > SMALL_KL):
        return None
    distance = "loss.beta is 0, so the KL is not known" if kl is None else f"the KL is {kl:.2g} nats a token"
    vanishes = run.recipe.model.dtype == "bfloat16" and run.recipe.optim.learning_rate < 1e-5
    return Finding(
        "learning_rate_too_low",
        0.6,
        f"After {len(run.rows)} steps the reward is where it was ({reward}), and so is the entropy ({entropy}); "
        f"{distance}.",
        "The policy is still the model that it started as: the updates are too small"
        + (", and in bfloat16 most of them are rounded away." if vanishes else ", or too few."),
        f"Raise optim.learning_rate from {_rate(run)} to {_rate(run, 10)}"
        + ("; set model.dtype: float32, or train an adapter with model.lora." if vanishes else "."),
    )


def _rate(run: Run, factor: float = 1) -> str:
    return f"{run.recipe.optim.learning_rate * factor:.3g}"
