"""Mean reward, pass@k and lengths on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from grpo_cli.algorithm.advantages import weighted_sum
from grpo_cli.data.prompts import PromptDataset
from grpo_cli.episode.environments import seconds_of_environments
from grpo_cli.record.metrics import Metrics
from grpo_cli.reward.hooks import NO_RUN, Logged, TrainerState, logged_metrics
from grpo_cli.rollout.background import BackgroundScorer
from grpo_cli.rollout.engine import Completion, RolloutEngine
from grpo_cli.rollout.rollout import generate_rollout
from grpo_cli.train.metrics import completion_metrics, episode_metrics, reward_metrics

EVAL_STREAM = 1
"""Evaluations draw from their own stream of random numbers, the same at every step, so that they compare."""

PASS_REWARD = 1.0
"""A completion whose weighted reward reaches this counts as correct for pass@k."""


def evaluate(
    engine: RolloutEngine,
    background: BackgroundScorer,
    dataset: PromptDataset,
    *,
    seed: int,
    step: int,
    num_generations: int,
    prompts_per_batch: int,
    pass_at: Sequence[int] = (),
    pass_reward: float = PASS_REWARD,
    state: TrainerState = NO_RUN,
) -> Metrics:
    """Generate and score completions for every prompt.

    Args:
        engine: generates under the current weights.
        background: the recipe's reward functions.
        dataset: of held-out prompts.
        seed: of the run.
        step: for the messages of a failing reward function.
        num_generations: completions per prompt.
        prompts_per_batch: prompts that are generated at once.
        pass_at: the k of pass@k; 1 and `num_generations` if empty.
        pass_reward: least weighted reward of a correct completion.
        state: what reward functions are told of the run.

    Returns:
        Metrics named as in training, those of reward functions too, with `eval_` before them, and `eval_pass@k`.
    """
    rewards: list[torch.Tensor] = []
    logged: list[Logged] = []
    completions: list[Completion] = []
    scorer = background.scorer
    for start in range(0, len(dataset), prompts_per_batch):
        prompts = [dataset[i] for i in range(start, min(start + prompts_per_batch, len(dataset)))]
        with background.begin(step, state) as scores:
            rollout = generate_rollout(
                engine, prompts, (seed, EVAL_STREAM), num_generations, first=start, on_group=scores.add
            )
            rewards.append(torch.from_numpy(scores.result(rollout)))
        logged += scores.logged
        completions.extend(rollout.completions)
    all_rewards = torch.cat(rewards)  # (N, K)
    metrics = reward_metrics(all_rewards, scorer.names, scorer.weights, num_generations)
    metrics |= completion_metrics(completions) | episode_metrics(completions)
    metrics |= seconds_of_environments(scorer.functions)
    total = weighted_sum(all_rewards, scorer.weights).view(-1, num_generations)  # (P, G)
    for k in pass_at or sorted({1, num_generations}):
        metrics[f"pass@{k}"] = pass_at_k(total, k, pass_reward)
    metrics |= logged_metrics(logged)
    return {f"eval_{name}": value for name, value in metrics.items()}


def pass_at_k(rewards: torch.Tensor, k: int, pass_reward: float) -> float:
    """Chance that at least one of k completions of a prompt is correct, averaged over prompts.

    The unbiased estimator 1 - C(n-c, k) / C(n, k) with c of n scored completions correct (arXiv:2107.03374 eq. 1).
    Prompts with fewer than k scored completions are left out.

    Args:
        rewards: (P, G) weighted rewards, NaN where nothing was scored.
        k: between 1 and G.
        pass_reward: least reward of a correct completion.
    """
    chances = []
    for row in rewards:
        scored = row[~row.isnan()]
        n, correct = len(scored), int((scored >= pass_reward).sum())
        if n >= k:
            chances.append(1 - math.comb(n - correct, k) / math.comb(n, k))
    return sum(chances) / len(chances) if chances else math.nan
