"""The settings of a recipe that decide how much memory and traffic a run needs, for a GPU that has bfloat16."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_cli.distributed.environment import planned_strategy
from grpo_cli.recipe import limits
from grpo_cli.recipe.schema import LoraConfig, Recipe
from grpo_cli.recipe.strategies import STRATEGIES, StrategyName, StrategyTraits

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}

ASSUMED_PROMPT_TOKENS = 512
"""Length of the longest prompt where `data.max_prompt_tokens` does not say."""


@dataclass(frozen=True)
class Setup:
    """What memory and traffic depend on, beside the model's shape."""

    strategy: StrategyName
    processes: int
    weight_bytes: int
    """Bytes of one trained weight."""
    compute_bytes: int
    """Bytes of one value in forward and backward passes."""
    gradient_checkpointing: bool
    cpu_offload: bool
    pack_tokens: int
    """Tokens in one forward pass."""
    shortest_pack: int
    """Tokens of the longest prompt with its longest completion, which is never split over two forward passes."""
    cached_tokens: int
    """Tokens whose keys and values the transformers engine keeps at once."""
    cached_rows: int
    """Completions that the transformers engine generates at once."""
    engine: str
    lora: LoraConfig | None
    has_reference: bool
    """Whether a second model is loaded for the KL term."""

    @property
    def traits(self) -> StrategyTraits:
        return STRATEGIES[self.strategy]

    @property
    def has_autocast(self) -> bool:
        return self.compute_bytes != self.weight_bytes

    @property
    def weight_share(self) -> int:
        """Over how many processes the weights are divided."""
        return self.processes if self.traits.shards_weights else 1

    @property
    def gradient_share(self) -> int:
        """Over how many processes the gradients are divided."""
        return self.processes if self.traits.shards_gradients else 1

    @property
    def state_share(self) -> int:
        """Over how many processes the optimizer's state is divided."""
        return self.processes if self.traits.shards_optimizer else 1


def prompt_tokens(recipe: Recipe) -> int:
    """Tokens of the longest prompt, or an assumption where the recipe sets no limit."""
    return recipe.data.max_prompt_tokens or ASSUMED_PROMPT_TOKENS


def setup_of(recipe: Recipe) -> Setup:
    """Read the settings off a recipe.

    Raises:
        UserError: the strategy cannot be told, such as when the DeepSpeed file is missing.
    """
    model, generation, train = recipe.model, recipe.generation, recipe.train
    processes = recipe.distributed.processes or 1
    weight_bytes = BYTES_PER_VALUE[model.dtype]
    prompt = prompt_tokens(recipe)
    longest = prompt + generation.max_completion_tokens
    group = prompt + generation.num_generations * generation.max_completion_tokens
    own_groups = math.ceil(train.prompts_per_step / processes)
    cached_groups = min(own_groups, max(1, limits.CACHE_TOKENS // group))
    budget = train.max_tokens_per_microbatch or limits.automatic_microbatch_tokens("cuda", prompt)
    return Setup(
        strategy=planned_strategy(recipe.distributed, processes),
        processes=processes,
        weight_bytes=weight_bytes,
        compute_bytes=2 if model.compute_dtype == "auto" else BYTES_PER_VALUE[model.compute_dtype],
        gradient_checkpointing=model.gradient_checkpointing,
        cpu_offload=recipe.distributed.cpu_offload,
        pack_tokens=max(budget, longest),
        shortest_pack=longest,
        cached_tokens=cached_groups * group,
        cached_rows=cached_groups * generation.num_generations,
        engine=generation.engine,
        lora=model.lora,
        has_reference=recipe.loss.beta > 0 and (model.reference is not None or model.lora is None),
    )
