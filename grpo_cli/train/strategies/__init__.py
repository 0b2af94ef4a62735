"""How the policy, its gradients and its optimizer are spread over processes."""

from __future__ import annotations

from grpo_cli.launch.environment import StrategyName
from grpo_cli.launch.ranks import Ranks
from grpo_cli.recipe.schema import Recipe
from grpo_cli.train.strategies.base import Strategy
from grpo_cli.train.strategies.replicated import Replicated

__all__ = ["Strategy", "make_strategy"]


def make_strategy(name: StrategyName, recipe: Recipe, ranks: Ranks) -> Strategy:
    """The strategy of that name for this recipe."""
    if name == "fsdp":
        from grpo_cli.train.strategies.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(recipe, ranks)
    if name.startswith("zero"):
        from grpo_cli.train.strategies.zero import Zero

        return Zero(recipe, ranks, stage=int(name[-1]))
    return Replicated(ranks, recipe.optim.max_grad_norm)
