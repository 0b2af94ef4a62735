"""Puts a run together from its recipe: everything that the loop needs, in one place.

All that can be wrong with a recipe's files, rewards and model is found here, before the first step.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from grpo_cli.algorithm.packing import Pack
from grpo_cli.data.prompts import PromptDataset
from grpo_cli.data.rows import PromptRows, load_rows
from grpo_cli.data.sampler import PromptSampler
from grpo_cli.distributed.environment import StrategyName
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import Strategy, make_strategy
from grpo_cli.errors import RunError, UserError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.model import load_policy, load_tokenizer
from grpo_cli.policy.reference import Reference, reference_model
from grpo_cli.recipe.schema import ModelConfig, Recipe
from grpo_cli.recipe.unused import unused_settings
from grpo_cli.reward.registry import check_columns, resolve_rewards, reward_from_callable
from grpo_cli.reward.scorer import Scorer
from grpo_cli.rollout.build import build_engine
from grpo_cli.rollout.engine import RolloutEngine
from grpo_cli.train.optim import build_optimizer, check_coverage

TRAIN_STREAM = 0
"""Rollouts draw from this stream of random numbers; evaluations have their own."""

Autocast = Callable[[], AbstractContextManager[Any]]


@contextmanager
def explained_failures(recipe: Recipe) -> Iterator[None]:
    """Turn a full device or disk into a RunError that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the device is out of memory; lower train.max_tokens_per_microbatch (it is "
            f"{recipe.train.max_tokens_per_microbatch or 'automatic'}) or generation.max_completion_tokens, "
            "or set model.gradient_checkpointing or model.lora"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or recipe.train.output_dir
        raise RunError(f"{place}: {error.strerror}; make room, then --resume") from error


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """On a CPU, add in a fixed order, whatever the threads do.

    Otherwise the gradient of a prompt's last position, from which every completion of its group starts, is a sum
    in the order in which threads come by. On a GPU some kernels have no such variant: nothing is promised there.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fills


@dataclass(frozen=True)
class Objects:
    """What a Python caller has as objects, in place of the recipe's names."""

    model: Any = None
    tokenizer: Any = None
    rewards: Sequence[Callable[..., Any]] | None = None
    train_data: Any = None
    eval_data: Any = None
    callbacks: Sequence[Any] = ()
    optimizer: Any = None


@dataclass
class Run:
    """The parts of a run."""

    recipe: Recipe
    folder: Path
    ranks: Ranks
    strategy: Strategy
    model: Any
    optimizer: torch.optim.Optimizer
    policy: PackedModel
    tokenizer: Any
    reference: Reference | None
    autocast: Autocast
    engine: RolloutEngine
    scorer: Scorer
    dataset: PromptDataset
    eval_dataset: PromptDataset | None
    sampler: PromptSampler
    max_steps: int
    notes: list[str] = field(default_factory=list)
    """What the user should know before the run starts."""

    @property
    def shared_prompt(self) -> bool:
        """Whether policy and reference, on all ranks, take shared-prompt packs."""
        return self.policy.shares_prompts

    def to_device(self, pack: Pack) -> Pack:
        return pack.to(self.ranks.device)

    def seed_step(self, step: int) -> None:
        """Make all randomness of a step a function of (seed, step), so that a resumed run repeats it."""
        state = np.random.SeedSequence([self.recipe.train.seed, step]).generate_state(1)
        set_seed(int(state[0]))


def load_prompt_rows(recipe: Recipe, objects: Objects) -> tuple[PromptRows, PromptRows | None]:
    """The training prompts, and the held-out ones if there are any, before tokenisation."""
    train_rows = load_rows(recipe.data, setting="data", data=objects.train_data)
    if recipe.data.eval is None:
        return train_rows, None
    return train_rows, load_rows(recipe.data.eval, setting="data.eval", data=objects.eval_data)


def load_scorer(recipe: Recipe, objects: Objects, rows: Sequence[PromptRows | None]) -> Scorer:
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
            check_columns(functions, part.columns, part.setting)
    return Scorer(functions)


def build_run(
    recipe: Recipe,
    objects: Objects,
    ranks: Ranks,
    strategy: StrategyName = "none",
    *,
    with_reference: bool = True,
    note: Callable[[str], None] = print,
) -> Run:
    """Load data, rewards and model; `note` is told what takes long. The caller closes the run's engine.

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
    rows, eval_rows = load_prompt_rows(recipe, objects)
    scorer = load_scorer(recipe, objects, [rows, eval_rows])
    tokenizer = load_tokenizer(recipe.model, tokenizer=objects.tokenizer)
    template = recipe.model.chat_template_kwargs
    dataset = PromptDataset(rows, tokenizer, chat_template_kwargs=template)
    eval_dataset = PromptDataset(eval_rows, tokenizer, chat_template_kwargs=template) if eval_rows else None

    set_seed(recipe.train.seed)
    spread = make_strategy(strategy, recipe, ranks)
    model = _on_all_ranks(ranks, lambda: load_policy(recipe.model, model=objects.model, loading=spread.loading))
    spread.take(model)
    needs_reference = with_reference and recipe.loss.beta > 0
    frozen = None
    if needs_reference:
        frozen = _on_all_ranks(ranks, lambda: reference_model(model, recipe.model, spread.loading, spread.copied))
    optimizer = objects.optimizer or build_optimizer(model, recipe.optim)
    check_coverage(model, optimizer)
    spread.prepare(model, optimizer)
    run_frozen = None if frozen is None else spread.prepare_frozen(frozen)
    autocast = autocast_for(recipe.model, ranks.device)
    with autocast():  # the self-check runs the kernels in the precision that training will have
        policy = PackedModel(model, spread.run, ranks.device)
        other = None if frozen is None else PackedModel(frozen, run_frozen, ranks.device)
    reference = Reference(policy, other) if needs_reference else None
    agree_on_sharing(ranks, {"the policy": policy} | ({} if other is None else {"the reference": other}))
    engine = build_engine(recipe, policy, tokenizer, autocast, note, ranks, spread)
    run = Run(
        recipe=recipe,
        folder=Path(recipe.train.output_dir).expanduser(),
        ranks=ranks,
        strategy=spread,
        model=model,
        optimizer=optimizer,
        policy=policy,
        tokenizer=tokenizer,
        reference=reference,
        autocast=autocast,
        engine=engine,
        scorer=scorer,
        dataset=dataset,
        eval_dataset=eval_dataset,
        sampler=PromptSampler(len(dataset), recipe.train.prompts_per_step, recipe.train.seed, recipe.data.shuffle),
        max_steps=recipe.train.number_of_steps(len(dataset)),
    )
    run.notes = list(_notes(run))
    return run


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


def _notes(run: Run) -> Sequence[str]:
    notes = []
    for data, limit in (
        (run.dataset, run.recipe.data.max_prompt_tokens),
        (run.eval_dataset, run.recipe.data.eval.max_prompt_tokens if run.recipe.data.eval else None),
    ):
        if data is not None and (data.dropped or data.truncated):
            done = f"dropped {data.dropped}" if data.dropped else f"truncated {data.truncated}"
            total = len(data) + data.dropped
            notes.append(f"{data.rows.setting}: {done} of {total} prompts over {limit} tokens")
    notes.extend(unused_settings(run.recipe, conversational=run.dataset.rows.conversational))
    if not run.shared_prompt:
        why = run.policy.why_not_shared
        notes.append(f"prompts are not shared, each completion is a padded row of its own: {why}")
    return notes


def autocast_for(config: ModelConfig, device: torch.device) -> Autocast:
    """Context manager factory for the precision of forward passes.

    Raises:
        UserError: bfloat16 is asked for on a GPU that has none.
    """
    # Emulated bfloat16, which torch counts as support otherwise, is slower than float32.
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = config.compute_dtype
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" and has_bfloat16 else "float32"
    if wanted == "bfloat16" and not has_bfloat16:
        raise UserError("model.compute_dtype: this GPU has no bfloat16; write float32")
    if wanted == config.dtype or wanted == "float32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
