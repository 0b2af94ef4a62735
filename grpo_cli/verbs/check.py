"""`grpo check`: what is wrong with a recipe and what it names, found without loading the model. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo_cli.data.rows import PromptRows, recipe_rows
from grpo_cli.episode.cast import Cast
from grpo_cli.errors import UserError
from grpo_cli.plan.fit import check_fit, gpu_of, memory_rows
from grpo_cli.plan.memory import trained_parameters
from grpo_cli.plan.nvidia import idle_gpu_by_metadata
from grpo_cli.plan.setup import setup_of
from grpo_cli.plan.shape import model_size
from grpo_cli.plan.traffic import traffic_rows
from grpo_cli.plugins import load_object
from grpo_cli.policy.files import check_gguf, locate_gguf, read_chat_template
from grpo_cli.recipe.schema import GenerationConfig, ModelConfig, Recipe
from grpo_cli.recipe.unused import unused_settings
from grpo_cli.reward.hooks import state_of_run
from grpo_cli.reward.registry import check_columns, resolve_rewards
from grpo_cli.reward.scorer import RewardError, Scorer, ScoringBatch
from grpo_cli.rollout.replay import check_stored
from grpo_cli.serve.lock import read_key
from grpo_cli.train.callbacks import load_callbacks
from grpo_cli.train.loss_function import load_loss_function
from grpo_cli.verbs.check_episode import checked_episode

SAMPLE_TEXTS = ("A short sample completion.", "Another one,\nin two lines: \\boxed{42}")
"""Completions that the reward functions are tried on. They must cope with anything that a model may write."""


def check(recipe: Recipe, console: Console, *, gpu_memory: float | None = None) -> None:
    """Check data, rewards and other plugins of a valid recipe, and print the plan.

    Args:
        recipe: valid by itself.
        console: where to print.
        gpu_memory: GiB of each GPU that the run will have. If None, that of this machine's, or else an assumption.

    Raises:
        UserError: something that the recipe names is missing or does not work, or the run does not fit into the
            memory of GPUs that are given or found here.
    """
    rows, eval_rows = recipe_rows(recipe)
    functions = resolve_rewards(recipe.rewards, load_models=False)
    cast = Cast.of(recipe)
    for part in filter(None, (rows, eval_rows)):
        check_columns(functions, part.columns, part.setting, has_environments=bool(recipe.environments))
        cast.check_rows(part.columns, part.setting)
        for row in range(len(part)):
            part.content(row)
    scorer = Scorer(cast.with_rewards(functions))
    with checked_episode(recipe, cast, rows, console) as environments:
        if cast.kinds and not environments:  # there is nothing that these could look at
            scorer = Scorer([one for one in scorer.functions if not one.asks_for_environments])
        try:
            state = state_of_run(recipe, len(rows))
            scores = scorer.score(sample_batch(rows, environments), step=0, state=state)
        except RewardError as error:
            raise UserError(f"on a sample row of the data: {error}") from error
    if recipe.loss.is_function:
        load_loss_function(recipe.loss.type)
    if recipe.optim.name != "adamw":
        load_object(recipe.optim.name, setting="optim.name")
    load_callbacks(recipe.train.callbacks)
    folder = check_model_files(recipe.model)
    server = recipe.generation.server
    if server is not None and server.api_key_file is not None:
        read_key(Path(server.api_key_file).expanduser())

    if recipe.generation.replay is not None:
        folder_of_run = Path(recipe.generation.replay).expanduser()
        check_stored(folder_of_run, recipe.train.max_steps or 1, scorer.functions)

    for note in unused_settings(recipe, conversational=rows.conversational):
        console.print(escape(note), soft_wrap=True)
    table = Table(show_header=False, box=None)
    setup, size, gpu = setup_of(recipe), model_size(recipe.model, folder), gpu_of(gpu_memory)
    lines = [*plan(recipe, rows, eval_rows), *memory_rows(setup, size, gpu)]
    if size.parameters is not None:
        trained = trained_parameters(setup, size.parameters, size.shape)
        lines += traffic_rows(recipe, setup, size.parameters, trained)
    for name, value in lines:
        table.add_row(f"[bold]{name}", escape(value))
    for name, weight, score in zip(scorer.names, scorer.weights, scores[0].tolist(), strict=True):
        shown = "None" if math.isnan(score) else f"{score:g}"
        table.add_row("[bold]reward", escape(f"{name}, weight {weight:g}: {shown} for {SAMPLE_TEXTS[0]!r}"))
    for reward in recipe.rewards:
        if reward.model is not None:
            table.add_row("[bold]reward", escape(f"{reward.metric_name}: a model, not loaded here"))
    console.print(table)
    warning = check_fit(setup, size, gpu)
    for line in filter(None, (warning, idle_gpu_by_metadata(os.environ))):
        console.print(escape(line), soft_wrap=True)
    console.print("[green]the recipe is fine[/]")


def check_model_files(config: ModelConfig) -> Path:
    """Check what the `model` section names on this machine; return the model's folder, which may be a Hub id.

    Raises:
        UserError: a file or folder is missing or is not what it should be.
    """
    folder, gguf_file = locate_gguf(config.name, config.gguf_file)
    if gguf_file is not None and Path(folder).is_dir():
        check_gguf(Path(folder, gguf_file))
    if config.reference is not None:
        locate_gguf(config.reference, None, setting="model.reference")
    if config.tokenizer is not None:
        locate_gguf(config.tokenizer, None, setting="model.tokenizer")
    if config.chat_template is not None:
        read_chat_template(config.chat_template)
    return Path(folder)


def sample_batch(rows: PromptRows, environments: Sequence[Any] = ()) -> ScoringBatch:
    """The first row with two made-up completions, and the environment that it would be played in, if any."""
    prompt, columns = rows.content(0), rows.row_columns(0)
    count = len(SAMPLE_TEXTS)
    replies = [[{"role": "assistant", "content": text}] for text in SAMPLE_TEXTS]
    return ScoringBatch(
        prompts=[prompt] * count,
        completions=replies if rows.conversational else list(SAMPLE_TEXTS),
        completion_ids=[list(range(len(text.split()))) for text in SAMPLE_TEXTS],
        columns={name: [value] * count for name, value in columns.items()},
        environments=list(environments) * count or None,
    )


def plan(recipe: Recipe, rows: PromptRows, eval_rows: PromptRows | None) -> list[tuple[str, str]]:
    """What the run will do, as (name, text)."""
    train, generation = recipe.train, recipe.generation
    completions = train.prompts_per_step * generation.num_generations
    updates = train.optimizer_steps_per_rollout * train.num_iterations
    steps = train.number_of_steps(len(rows))
    passes = steps * train.prompts_per_step / len(rows)
    count = recipe.distributed.processes or 1
    processes = f"{count} process{'es' * (count > 1)}"
    kind = "chats" if rows.conversational else "texts"
    step = (
        f"{train.prompts_per_step} prompts x {generation.num_generations} = {completions} completions of up to "
        f"{generation.max_completion_tokens} tokens, {updates} optimizer step{'s' * (updates > 1)}"
    )
    tokens = completions * generation.max_completion_tokens
    return [
        ("model", f"{recipe.model.name} in {recipe.model.dtype}" + (", LoRA" if recipe.model.lora else "")),
        ("data", f"{len(rows)} prompts ({kind}); columns for rewards: {', '.join(rows.columns) or 'none'}"),
        *([("evaluation", f"{len(eval_rows)} prompts")] if eval_rows is not None else []),
        ("step", step),
        ("engine", engine_plan(generation)),
        ("run", f"{steps} steps, {passes:.2g} passes over the prompts, {processes}, into {train.output_dir}"),
        ("tokens", f"up to {tokens} sampled in a step, {steps * tokens} in the run"),
    ]


def engine_plan(generation: GenerationConfig) -> str:
    """Where completions are generated."""
    server = generation.server
    if server is None:
        return generation.engine
    if server.spawn:
        return f"{generation.engine}, started by the run, {server.tensor_parallel_size} GPU(s)"
    return f"{generation.engine} at {', '.join(server.urls)}"
