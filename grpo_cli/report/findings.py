"""What looks wrong in a run, in words: the rules, and the finding of each that applies.

A rule is a pure function of a run's numbers and stored completions. It finds nothing where a metric is not there,
and where there are too few steps to tell.
"""

from __future__ import annotations

from collections.abc import Callable

from grpo_cli.errors import RunError, one_line
from grpo_cli.report.finding import Finding
from grpo_cli.report.rules.episodes import failing_tools, lost_episodes, unused_tools
from grpo_cli.report.rules.evaluation import evaluation_missing, evaluation_noisy, overfitting
from grpo_cli.report.rules.learning import learning_rate_too_high, learning_rate_too_low, reward_fell
from grpo_cli.report.rules.lengths import length_without_reward, truncated
from grpo_cli.report.rules.policy import (
    clipped_ratio,
    entropy_collapse,
    gradient_clipped,
    kl_running_away,
    sampler_mismatch,
    skipped_steps,
)
from grpo_cli.report.rules.repetition import repeated_completions
from grpo_cli.report.rules.rewards import constant_reward, drowned_reward, no_spread, skipped_groups
from grpo_cli.report.rules.speed import bottleneck
from grpo_cli.report.run import Run

RULES: tuple[Callable[[Run], Finding | None], ...] = (
    constant_reward,
    no_spread,
    skipped_groups,
    drowned_reward,
    reward_fell,
    learning_rate_too_high,
    learning_rate_too_low,
    entropy_collapse,
    kl_running_away,
    clipped_ratio,
    gradient_clipped,
    sampler_mismatch,
    skipped_steps,
    truncated,
    length_without_reward,
    repeated_completions,
    failing_tools,
    unused_tools,
    lost_episodes,
    overfitting,
    evaluation_missing,
    evaluation_noisy,
    bottleneck,
)
"""All that is looked for; of two findings as bad as each other, the one whose rule is above comes first."""

WORTH_TELLING = 0.4
"""Badness from which on a finding is told without being asked for: those that cost learning, not time."""


def find(run: Run) -> list[Finding]:
    """What looks wrong in a run, worst first. A file that a rule could not read is a finding, too."""
    found = list(filter(None, (_judged(rule, run) for rule in RULES)))
    return sorted(dict.fromkeys(found), key=lambda one: -one.badness)


def _judged(rule: Callable[[Run], Finding | None], run: Run) -> Finding | None:
    try:
        return rule(run)
    except RunError as error:
        return Finding(
            "damaged_file",
            0.3,
            f"{one_line(error).rstrip('.')}.",
            "Rules that read completions had nothing to go by.",
            "If the run was copied, copy the file anew; else remove it, and the report goes by the other steps.",
        )
