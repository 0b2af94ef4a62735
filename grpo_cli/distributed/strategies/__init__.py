"""How the policy, its gradients and its optimizer are spread over processes."""

from __future__ import annotations

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies.base import Strategy
from grpo_cli.distributed.strategies.replicated import Replicated
from grpo_cli.recipe.schema import Recipe
from grpo_cli.recipe.strategies import STRATEGIES, StrategyName

__all__ = ["Strategy", "make_strategy"]


def make_strategy(name: StrategyName, recipe: Recipe, ranks: Ranks) -> Strategy:
    """The strategy of that name for this recipe."""
    traits = STRATEGIES[name]
    if traits.uses_deepspeed:
        from grpo_cli.distributed.strategies.zero import Zero

        return Zero(recipe, ranks, traits)
    if name == "fsdp":
        from grpo_cli.distributed.strategies.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(recipe, ranks)
    return Replicated(ranks, recipe.optim.max_grad_norm)
