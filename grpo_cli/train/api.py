"""`grpo_cli.train`: the one door to training, for the command line and for Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from grpo_cli.distributed.environment import resolve_strategy
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import EXPECTED_ERRORS, ServerLost, ServerNeverReached, StoppedEarly, UserError
from grpo_cli.recipe.load import read_recipe, validate
from grpo_cli.recipe.overrides import apply_override
from grpo_cli.recipe.schema import Recipe
from grpo_cli.rollout.rollout import Rollout, generate_rollout
from grpo_cli.train.checkpoint import check_run_folder, save_final
from grpo_cli.train.display import Display
from grpo_cli.train.loop import train_loop
from grpo_cli.train.run import Objects, Run, build_run, deterministic_kernels, explained_failures
from grpo_cli.train.session import Session, mean_reward
from grpo_cli.train.signals import StopRequest, compile_in_this_process
from grpo_cli.train.trackers import check_trackers

SHOWCASE_STREAM = 2
"""The completions that are shown before and after training draw from this stream of random numbers."""

IN_MEMORY = "in-memory"
"""Stands in the written recipe for a model or data that came as an object."""


@dataclass(frozen=True)
class TrainResult:
    output_dir: Path
    """Folder of the run; `final/` in it is the trained model."""
    metrics: list[dict[str, Any]]
    """The rows of `metrics.jsonl`, one for each step."""
    model: Any
    tokenizer: Any


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    model: Any = None,
    tokenizer: Any = None,
    rewards: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    callbacks: Sequence[Any] = (),
    optimizer: Any = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> TrainResult:
    """Train a model with GRPO.

    Args:
        recipe: path of a YAML recipe, a mapping of the same shape, or a `Recipe`. Its `model`, `data` and
            `rewards` may be left out where objects are given.
        model: a transformers causal language model; trained in place.
        tokenizer: its tokenizer.
        rewards: reward functions, in place of the recipe's; if the recipe lists as many, its names, weights,
            `timeout_s`, `on_error` and `workers` apply to them.
        train_data: a `datasets.Dataset`, a list of dicts, a pyarrow table or a pandas frame.
        eval_data: held-out prompts of the same kinds.
        callbacks: objects with methods of `grpo_cli.Callback`.
        optimizer: a torch optimizer over all of `model`'s trainable parameters, with a learning rate of its own;
            of the recipe's `optim` section `scheduler`, `warmup_ratio` and `max_grad_norm` apply.
        resume: continue from the last checkpoint in `train.output_dir`.
        overrides: `key.path=value` strings, as with `--set`.
        console: where to print.

    Returns:
        TrainResult.

    Raises:
        UserError: the recipe or something that it names is wrong; nothing was trained.
        RunError: the run failed; its checkpoints are kept.
        StoppedEarly: SIGINT, SIGTERM or SIGUSR1 came, or a rollout server stays away; a checkpoint was written.
    """
    if optimizer is not None and model is None:
        raise UserError("optimizer: an optimizer object needs the model object whose parameters it holds")
    functions = [rewards] if callable(rewards) else rewards
    objects = Objects(model, tokenizer, functions, train_data, eval_data, callbacks, optimizer)
    loaded = recipe_with_objects(recipe, objects, overrides)
    strategy = resolve_strategy(loaded.distributed, os.environ)
    ranks = Ranks.join(needs_group=strategy not in ("none", "ddp"))
    console = (console or Console()) if ranks.is_main else Console(quiet=True)
    check_trackers(loaded.logging.trackers)
    ranks.led(lambda: check_run_folder(loaded, resume=resume))
    compile_in_this_process()
    with explained_failures(loaded), deterministic_kernels(), ranks.leaving_together():
        run = build_run(
            loaded, objects, ranks, strategy, note=lambda text: console.print(escape(text), soft_wrap=True)
        )
        with (
            StopRequest() as stop_request,
            Display(console, run.max_steps, loaded.logging.every) as display,
            _closed_at_the_end(run, display),
            closing(Session(run, objects, stop_request, display)) as session,
        ):
            return _train_or_stop(run, session)


@contextmanager
def _closed_at_the_end(run: Run, display: Display) -> Iterator[None]:
    try:
        yield
    finally:
        with display.noting():
            run.engine.close()


def _train_or_stop(run: Run, session: Session) -> TrainResult:
    """Train; where a server is lost, with a checkpoint as the end."""
    try:
        return _train(run, session)
    except ServerLost as lost:
        if isinstance(lost, ServerNeverReached) and session.resumed_from is None:
            raise UserError(str(lost)) from lost
        session.save_checkpoint()
        raise StoppedEarly(f"{lost}\nstopped after step {session.position.step}; continue with --resume") from lost


def _train(run: Run, session: Session) -> TrainResult:
    display = session.display
    if session.resumed_from is not None:
        run.notes.append(f"resuming from {session.resumed_from}")
    for note in run.notes:
        display.note(note)
    before = None
    if session.position.step == 0:
        run.engine.update_weights(0)  # a server that is not there is found before anything has begun
        before = _showcase(run, 0)
    session.start()
    train_loop(run, session)
    with display.noting():
        session.notify("on_train_end")
    final = save_final(run)
    after = None
    # What fails on one of several ranks alone leaves the others waiting: it has to end the process.
    with display.noting(Exception if run.ranks.world_size == 1 else EXPECTED_ERRORS):
        after = _showcase(run, session.position.step)
    with display.noting():
        for title, rollout in (("before training", before), ("after training", after)):
            if rollout is not None and run.ranks.is_main:
                scores = torch.from_numpy(run.scorer.score(rollout.scoring_batch(), step=session.position.step))
                display.completions(title, rollout, run.scorer.names, scores)
    history = _closing_notes(run, session, final)
    return TrainResult(run.folder, history, run.model, run.tokenizer)


def _closing_notes(run: Run, session: Session, final: Path) -> list[dict[str, Any]]:
    """Say how it went and where everything is; return the rows of the metrics."""
    if session.log is None:
        return []
    display, folder, history = session.display, run.folder, session.log.metrics_file.history
    span = min(5, max(1, len(history) // 2))
    first, last = mean_reward(history[:span]), mean_reward(history[-span:])
    display.note(f"mean reward: {first:.4g} over the first {span} steps, {last:.4g} over the last {span}")
    display.note(f"final model:  {final}")
    display.note(f"metrics:      {folder / 'metrics.jsonl'} (also: tensorboard --logdir {folder})")
    display.note(f"completions:  {folder / 'completions'}")
    return history


def _showcase(run: Run, step: int) -> Rollout | None:
    """One completion for each of three prompts, the same ones whenever it is called; None if none are shown."""
    if not run.recipe.logging.print_completions:
        return None
    run.engine.update_weights(step)
    data = run.eval_dataset or run.dataset
    prompts = [data[index] for index in range(min(3, len(data)))]
    return generate_rollout(run.engine, prompts, (run.recipe.train.seed, SHOWCASE_STREAM), 1)


def recipe_with_objects(
    recipe: str | Path | Mapping[str, Any] | Recipe, objects: Objects, overrides: Sequence[str]
) -> Recipe:
    """The validated recipe, in which what came as an object is named as such.

    Raises:
        UserError: the recipe is wrong, or an object does not go with it.
    """
    raw = read_recipe(recipe)
    for override in overrides:
        apply_override(raw, override)
    values = raw.values
    if objects.model is not None:
        name = getattr(objects.model.config, "name_or_path", "") or IN_MEMORY
        dtype = str(objects.model.dtype).removeprefix("torch.")
        given = values.get("model") or {}
        values["model"] = {"name": name, "dtype": dtype, **given}
        if values["model"]["dtype"] != dtype:
            raise UserError(
                f"model.dtype is {given['dtype']}, but the model object was loaded in {dtype}; "
                f"load it with dtype={given['dtype']}, or change model.dtype"
            )
        if name == IN_MEMORY and objects.tokenizer is None and not given.get("tokenizer"):
            raise UserError("model: a model object without a name needs its tokenizer too; pass tokenizer=")
    if objects.train_data is not None:
        values["data"] = {"name": IN_MEMORY, **(values.get("data") or {})}
    if objects.eval_data is not None:
        data = values.get("data") or {}
        values["data"] = {**data, "eval": {"name": IN_MEMORY, **(data.get("eval") or {})}}
    if objects.rewards is not None:
        listed = values.get("rewards") or []
        settings = listed if len(listed) == len(objects.rewards) else [{}] * len(objects.rewards)
        values["rewards"] = [
            {**(entry if isinstance(entry, dict) else {}), "path": path_of(function), "params": {}, "model": None}
            for entry, function in zip(settings, objects.rewards, strict=True)
        ]
    return validate(raw)


def path_of(function: Callable[..., Any]) -> str:
    """`module:name` of a callable, for the written recipe."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
