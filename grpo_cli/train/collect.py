"""Generates and scores the groups of a step, and decides which of them it trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from grpo_cli.algorithm.advantages import compute_advantages, flat_groups
from grpo_cli.rollout.background import BackgroundScorer, RolloutScores
from grpo_cli.rollout.rollout import Rollout, generate_rollout
from grpo_cli.train.metrics import Metrics, StepClock
from grpo_cli.train.run import TRAIN_STREAM, Run

MAX_RESAMPLE_ROUNDS = 4
"""Times that `drop_zero_variance_groups: resample` generates further prompts for one step."""


@dataclass(frozen=True)
class Collected:
    """The groups of a step."""

    rollout: Rollout
    """Every group that was generated, the dropped ones too."""
    kept: list[int]
    """The groups that the step trains on."""
    rewards: Callable[[], torch.Tensor]
    """Completes the (N, K) rewards, NaN where a function did not apply."""
    metrics: Metrics


def collect_groups(run: Run, scorer: BackgroundScorer, step: int, clock: StepClock) -> Collected:
    """Generate the groups of a step; reward functions with workers score those that are finished meanwhile.

    Where zero-variance groups are dropped, this waits for the rewards. With `resample`, as many further prompts as
    groups are missing are generated, up to MAX_RESAMPLE_ROUNDS times (DAPO's dynamic sampling, arXiv:2503.14476).

    Raises:
        RewardError: a reward function failed.
    """
    try:
        return _collect(run, scorer, step, clock)
    finally:
        run.engine.release_memory()


def _collect(run: Run, scorer: BackgroundScorer, step: int, clock: StepClock) -> Collected:
    drop, wanted = run.recipe.loss.drop_zero_variance_groups, run.recipe.train.prompts_per_step
    rollout, scores = _generate(run, scorer, step, clock, run.sampler.at(step), first=0)
    if not drop:
        return Collected(rollout, list(range(wanted)), lambda: torch.from_numpy(scores.result(rollout)), {})
    rewards = _wait(scores, rollout, clock)
    kept = groups_with_spread(rewards, run)
    rounds = 0
    while drop == "resample" and len(kept) < wanted and rounds < MAX_RESAMPLE_ROUNDS:
        rounds += 1
        first = len(rollout.prompts)
        indices = run.sampler.further(step, first - wanted, wanted - len(kept))
        more, scores = _generate(run, scorer, step, clock, indices, first=first)
        rewards = torch.cat([rewards, _wait(scores, more, clock)])
        rollout = Rollout.joined([rollout, more])
        kept = groups_with_spread(rewards, run)
    counts = {"resample/rounds": rounds, "resample/generated_groups": len(rollout.prompts)}
    return Collected(rollout, kept, lambda: rewards, dict(counts) if drop == "resample" else {})


def kept_advantages(run: Run, rewards: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """(N,) advantages from the (N, K) rewards of the kept groups alone, 0 for the others."""
    loss, group_size = run.recipe.loss, run.recipe.generation.num_generations
    advantages = torch.zeros(len(rewards))
    if kept:
        rows = rows_of(kept, group_size)
        advantages[rows] = compute_advantages(
            rewards[rows], run.scorer.weights, group_size, loss.scale_rewards, loss.aggregation
        )
    return advantages


def groups_with_spread(rewards: torch.Tensor, run: Run) -> list[int]:
    """Indices of the groups whose weighted rewards are not all the same."""
    flat = flat_groups(rewards, run.scorer.weights, run.recipe.generation.num_generations)
    indices: list[int] = (~flat).nonzero().flatten().tolist()
    return indices


def rows_of(groups: Sequence[int], num_generations: int) -> torch.Tensor:
    """Where the completions of some groups stand in a step's (N, ...) tensors."""
    starts = torch.tensor(groups, dtype=torch.long) * num_generations
    return (starts[:, None] + torch.arange(num_generations)).flatten()


def _generate(
    run: Run, scorer: BackgroundScorer, step: int, clock: StepClock, indices: Sequence[int], first: int
) -> tuple[Rollout, RolloutScores]:
    recipe = run.recipe
    key, group_size = (recipe.train.seed, TRAIN_STREAM, step), recipe.generation.num_generations
    with clock("generate"), scorer.begin(step + 1) as scores:
        prompts = [run.dataset[index] for index in indices]
        rollout = generate_rollout(run.engine, prompts, key, group_size, first=first, on_group=scores.add)
    return rollout, scores


def _wait(scores: RolloutScores, rollout: Rollout, clock: StepClock) -> torch.Tensor:
    with clock("reward"):
        return torch.from_numpy(scores.result(rollout))
