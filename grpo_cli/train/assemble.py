"""Puts a run together from its recipe.

All that can be wrong with a recipe's files, rewards and model is found here, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from grpo_cli.algorithm.losses import LossOutput, MeasuredLoss
from grpo_cli.data.prompts import PromptDataset
from grpo_cli.data.rows import PromptRows, recipe_rows
from grpo_cli.data.sampler import PromptSampler
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import make_strategy
from grpo_cli.episode.cast import Cast
from grpo_cli.episode.driver import Driver
from grpo_cli.errors import UserError
from grpo_cli.policy.load import load_policy, load_tokenizer
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.reference import Reference, reference_model
from grpo_cli.recipe.schema import ModelConfig, Recipe
from grpo_cli.recipe.strategies import StrategyName
from grpo_cli.recipe.unused import unused_settings
from grpo_cli.reward.registry import check_columns, resolve_rewards, reward_from_callable
from grpo_cli.reward.scorer import Scorer
from grpo_cli.rollout.build import EngineParts, build_engine
from grpo_cli.rollout.embedded.engine import eos_token_ids
from grpo_cli.rollout.engine import RolloutEngine, TurnEngine
from grpo_cli.rollout.over_ranks import SplitEngine
from grpo_cli.train.guards import autocast_for
from grpo_cli.train.learner import Learner
from grpo_cli.train.loss_function import resolve_loss
from grpo_cli.train.manifest import faults
from grpo_cli.train.objects import Engine, Objects
from grpo_cli.train.optim import build_optimizer, build_scheduler, check_coverage
from grpo_cli.train.rollouts import Rollouts


def assemble(
    recipe: Recipe,
    objects: Objects,
    ranks: Ranks,
    strategy: StrategyName = "none",
    *,
    with_reference: bool = True,
    note: Callable[[str], None] = print,
) -> tuple[Rollouts, Learner]:
    """Load data, rewards and model. The caller closes the engine of the rollouts.

    Args:
        recipe: of the run.
        objects: what a Python caller has.
        ranks: the processes that train together.
        strategy: what they share.
        with_reference: load the model that the KL is measured against, where there is a KL.
        note: told what takes long.

    Raises:
        UserError: something that the recipe names cannot be used.
    """
    loss = resolve_loss(recipe.loss)
    check_whole_models(recipe.model, ranks)
    rows, eval_rows = recipe_rows(recipe, objects.train_data, objects.eval_data)
    cast = Cast.of(recipe, objects.tools, objects.environment)
    scorer = _scorer(recipe, objects, [rows, eval_rows], cast)
    tokenizer = load_tokenizer(recipe.model, tokenizer=objects.tokenizer)
    template = recipe.model.chat_template_kwargs | cast.template_kwargs
    dataset = PromptDataset(rows, tokenizer, chat_template_kwargs=template)
    eval_dataset = PromptDataset(eval_rows, tokenizer, chat_template_kwargs=template) if eval_rows else None
    train = recipe.train
    num_steps = train.number_of_steps(len(dataset)) * train.num_iterations * train.optimizer_steps_per_rollout
    learner = _learner(recipe, objects, ranks, strategy, tokenizer, loss, num_steps, with_reference=with_reference)
    engine = _engine(recipe, objects.engine, learner, cast, note)
    sampler = PromptSampler(len(dataset), train.prompts_per_step, train.seed, recipe.data.shuffle)
    return Rollouts(recipe, ranks, engine, scorer, dataset, eval_dataset, sampler), learner


def check_whole_models(config: ModelConfig, ranks: Ranks) -> None:
    """See that models which a run of ours has written, as `final/` or a checkpoint, are as they were written.

    Raises:
        UserError: a file of one is broken.
    """
    for setting, name in (("name", config.name), ("reference", config.reference), ("tokenizer", config.tokenizer)):
        if name is not None:
            check_whole(Path(name), f"model.{setting}", ranks)


def check_whole(folder: Path, setting: str, ranks: Ranks) -> None:
    """The same for one folder, or the folder of one file; nothing if it has no manifest.

    Raises:
        UserError: a file of it is broken.
    """
    folder = folder.expanduser() if folder.suffix != ".gguf" else folder.expanduser().parent
    for fault in chain(*ranks.together(lambda: faults(folder, ranks.rank, ranks.world_size))):
        raise UserError(f"{setting}: {folder} is damaged: {fault}; put the file back from a copy")


def _engine(
    recipe: Recipe, given: Engine | None, learner: Learner, cast: Cast, note: Callable[[str], None]
) -> RolloutEngine:
    """The recipe's engine, or a caller's own: with several processes each rank's generates what the rank owns."""
    ranks = learner.ranks

    def drive(engine: TurnEngine) -> RolloutEngine:
        world = cast.world(recipe, learner.tokenizer, eos_token_ids(learner.model, learner.tokenizer))
        return Driver(engine, recipe.generation.max_completion_tokens, world, note)

    if isinstance(given, RolloutEngine) and recipe.episode is not None:
        what = f"engine: {type(given).__name__} gives whole completions, so it cannot wait for tools"
        raise UserError(f"{what}; give it a method stream, or remove episode")
    if isinstance(given, (RolloutEngine, TurnEngine)):
        own = given if isinstance(given, RolloutEngine) else drive(given)
        return own if ranks.world_size == 1 else SplitEngine(own, ranks, nullcontext)
    parts = EngineParts(
        recipe, learner.policy, learner.tokenizer, learner.autocast, note, ranks, learner.strategy, drive
    )
    engine = build_engine(parts)
    return engine if given is None else given(engine)


def _learner(
    recipe: Recipe,
    objects: Objects,
    ranks: Ranks,
    strategy: StrategyName,
    tokenizer: Any,
    loss: Callable[..., MeasuredLoss | LossOutput],
    num_optimizer_steps: int,
    *,
    with_reference: bool,
) -> Learner:
    set_seed(recipe.train.seed)
    spread = make_strategy(strategy, recipe, ranks)
    model = _on_all_ranks(ranks, lambda: load_policy(recipe.model, model=objects.model, loading=spread.loading))
    spread.take(model)
    needs_reference = with_reference and recipe.loss.beta > 0
    frozen = None
    if needs_reference:
        frozen = _on_all_ranks(ranks, lambda: reference_model(model, recipe.model, spread.loading, spread.copied))
    optimizer = objects.optimizer or build_optimizer(model, recipe.optim, spread.whole_shape)
    check_coverage(model, optimizer)
    spread.prepare(model, optimizer)
    run_frozen = None if frozen is None else spread.prepare_frozen(frozen)
    autocast = autocast_for(recipe.model, ranks.device)
    with autocast():  # the self-check runs the kernels in the precision that training will have
        policy = PackedModel.checked(model, spread.run, ranks.device)
        other = None if frozen is None else PackedModel.checked(frozen, run_frozen, ranks.device)
    reference = Reference(policy, other) if needs_reference else None
    agree_on_sharing(ranks, {"the policy": policy} | ({} if other is None else {"the reference": other}))
    scheduler = build_scheduler(optimizer, recipe.optim, num_optimizer_steps)
    return Learner(
        recipe, ranks, spread, model, tokenizer, policy, reference, autocast, optimizer, scheduler, loss
    )


def _scorer(
    recipe: Recipe,
    objects: Objects,
    rows: Sequence[PromptRows | None],
    cast: Cast,
) -> Scorer:
    """The reward functions, checked against the columns that they will be given.

    Raises:
        UserError: a function cannot be found or made, or needs a column that the data lacks.
    """
    if objects.rewards is not None:
        functions = [
            replace(
                reward_from_callable(function, name=config.metric_name, weight=config.weight),
                timeout_s=config.timeout_s,
                on_error=config.on_error,
                workers=config.workers,
            )
            for function, config in zip(objects.rewards, recipe.rewards, strict=True)
        ]
    else:
        functions = resolve_rewards(recipe.rewards)
    for part in rows:
        if part is not None:
            check_columns(functions, part.columns, part.setting, has_environments=bool(cast.kinds))
            cast.check_rows(part.columns, part.setting)
    return Scorer(cast.with_rewards(functions))


def agree_on_sharing(ranks: Ranks, models: Mapping[str, PackedModel]) -> None:
    """Have all models of all ranks share prompts, or none: where one cannot, all know the first reason."""
    own = [f"{name}: {model.why_not_shared}" for name, model in models.items() if not model.shares_prompts]
    reasons = [reason for of_rank in ranks.gather(own) for reason in of_rank]
    for model in models.values():
        if reasons:
            model.take_plain_rows(reasons[0])


def _on_all_ranks(ranks: Ranks, load: Callable[[], Any]) -> Any:
    """What `load` gives here, once it has on every rank: one that fails must not leave the others waiting."""
    loaded: list[Any] = []
    ranks.together(lambda: loaded.append(load()))
    return loaded[0]


def notes(rollouts: Rollouts, learner: Learner) -> Iterator[str]:
    """What the user should know before the run starts."""
    recipe = rollouts.recipe
    for data, limit in (
        (rollouts.dataset, recipe.data.max_prompt_tokens),
        (rollouts.eval_dataset, recipe.data.eval.max_prompt_tokens if recipe.data.eval else None),
    ):
        if data is not None and (data.dropped or data.truncated):
            done = f"dropped {data.dropped}" if data.dropped else f"truncated {data.truncated}"
            total = len(data) + data.dropped
            yield f"{data.rows.setting}: {done} of {total} prompts over {limit} tokens"
    yield from unused_settings(recipe, conversational=rollouts.dataset.rows.conversational)
    if not learner.policy.shares_prompts:
        why = learner.policy.why_not_shared
        yield f"prompts are not shared, each completion is a padded row of its own: {why}"
