"""`grpo sample`: what the model writes for a few prompts and what the rewards say to it."""

from __future__ import annotations

import math
from contextlib import closing
from itertools import chain, count, islice

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.recipe.schema import Recipe
from grpo_cli.report.terminal import ending
from grpo_cli.rollout.rollout import generate_rollout
from grpo_cli.train.assemble import assemble, notes
from grpo_cli.train.display import conversation
from grpo_cli.train.guards import explained_failures
from grpo_cli.train.objects import Objects
from grpo_cli.train.rollouts import TRAIN_STREAM, Rollouts


def sample(recipe: Recipe, num_prompts: int, console: Console) -> None:
    """Print the groups of the first `num_prompts` prompts that training would see, with their rewards.

    Raises:
        UserError: something that the recipe names is missing.
        RewardError: a reward function failed.
    """
    with explained_failures(recipe):
        rollouts, learner = assemble(recipe, Objects(), Ranks(), with_reference=False)
    with closing(rollouts.engine):
        for note in notes(rollouts, learner):
            console.print(escape(note))
        _sample(rollouts, num_prompts, console)


def _sample(rollouts: Rollouts, num_prompts: int, console: Console) -> None:
    scorer, size = rollouts.scorer, rollouts.group_size
    order = chain.from_iterable(map(rollouts.sampler.at, count()))
    prompts = [rollouts.dataset[index] for index in islice(order, num_prompts)]
    rollouts.engine.update_weights(0)
    key = (rollouts.recipe.train.seed, TRAIN_STREAM, 0)
    rollout = generate_rollout(rollouts.engine, prompts, key, size)
    scores = scorer.score(rollout.scoring_batch(), step=0, state=rollouts.state(0))  # (N, K)
    for index, prompt in enumerate(prompts):
        table = Table(title=ending(prompt.content), show_lines=True, title_justify="left")
        for column in ("completion", "tokens", *scorer.names):
            table.add_column(escape(column))
        for row in range(index * size, (index + 1) * size):
            completion = rollout.completions[row]
            values = ["None" if math.isnan(score) else f"{score:.3g}" for score in scores[row].tolist()]
            table.add_row(conversation(completion), str(completion.num_sampled), *values)
        console.print(table)
