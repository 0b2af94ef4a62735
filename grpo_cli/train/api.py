"""`grpo_cli.train`: the one door to training, for the command line and for Python."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from grpo_cli.errors import RunError, UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import Recipe
from grpo_cli.rollout.rollout import Rollout, generate_rollout
from grpo_cli.train.callbacks import notify
from grpo_cli.train.checkpoint import check_run_folder, save_final
from grpo_cli.train.display import Display
from grpo_cli.train.loop import train_loop
from grpo_cli.train.run import Objects, Run, build_run
from grpo_cli.train.session import Session, mean_reward
from grpo_cli.train.signals import StopRequest
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
        rewards: reward functions, in place of the recipe's; weights of the recipe apply if it lists as many.
        train_data: a `datasets.Dataset`, a list of dicts, a pyarrow table or a pandas frame.
        eval_data: held-out prompts of the same kinds.
        callbacks: objects with methods of `grpo_cli.Callback`.
        optimizer: a torch optimizer over `model`'s parameters; the recipe's schedule drives its learning rate.
        resume: continue from the last checkpoint in `train.output_dir`.
        overrides: `key.path=value` strings, as with `--set`.
        console: where to print.

    Returns:
        TrainResult.

    Raises:
        UserError: the recipe or something that it names is wrong; nothing was trained.
        RunError: the run failed; its checkpoints are kept.
        StoppedBySignal: SIGINT, SIGTERM or SIGUSR1 came; a checkpoint was written.
    """
    if optimizer is not None and model is None:
        raise UserError("optimizer: an optimizer object needs the model object whose parameters it holds")
    functions = [rewards] if callable(rewards) else rewards
    objects = Objects(model, tokenizer, functions, train_data, eval_data, callbacks, optimizer)
    loaded = load_recipe(name_objects(recipe, objects), overrides)
    console = console or Console()
    check_trackers(loaded.logging.trackers)
    check_run_folder(loaded, resume=resume)
    run = build_run(loaded, objects)
    with StopRequest() as stop_request, Display(console, run.max_steps, loaded.logging.every) as display:
        session = Session(run, objects, stop_request, display)
        try:
            return _train(run, session)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"step {session.position.step + 1}: the device is out of memory; lower "
                f"train.max_tokens_per_microbatch (it is {run.token_budget}) or generation.max_completion_tokens, "
                "or set model.gradient_checkpointing or model.lora"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"step {session.position.step + 1}: {error.strerror} in {run.folder}; make room, then --resume"
            ) from error
        finally:
            session.close()


def _train(run: Run, session: Session) -> TrainResult:
    display, folder = session.display, run.folder
    if session.resumed_from is not None:
        run.notes.append(f"resuming from {session.resumed_from}")
    for note in run.notes:
        display.note(note)
    before = _showcase(run) if session.position.step == 0 else None
    session.start()
    train_loop(run, session)
    notify(session.callbacks, "on_train_end", session.state)
    final = save_final(run.model, run.tokenizer, folder)
    for title, rollout in (("before training", before), ("after training", _showcase(run))):
        if rollout is not None:
            scores = torch.from_numpy(run.scorer.score(rollout.scoring_batch(), step=session.position.step))
            display.completions(title, rollout, run.scorer.names, scores)
    history = session.metrics_file.history
    span = min(5, max(1, len(history) // 2))
    first, last = mean_reward(history[:span]), mean_reward(history[-span:])
    display.note(f"mean reward: {first:.4g} over the first {span} steps, {last:.4g} over the last {span}")
    display.note(f"final model:  {final}")
    display.note(f"metrics:      {folder / 'metrics.jsonl'} (also: tensorboard --logdir {folder})")
    display.note(f"completions:  {folder / 'completions'}")
    return TrainResult(folder, history, run.model, run.tokenizer)


def _showcase(run: Run) -> Rollout | None:
    """One completion for each of three prompts, the same ones whenever it is called."""
    if not run.recipe.logging.print_completions:
        return None
    data = run.eval_dataset or run.dataset
    prompts = [data[index] for index in range(min(3, len(data)))]
    return generate_rollout(run.engine, prompts, (run.recipe.train.seed, SHOWCASE_STREAM), 1)


def name_objects(
    recipe: str | Path | Mapping[str, Any] | Recipe, objects: Objects
) -> str | Path | Mapping[str, Any] | Recipe:
    """A mapping whose missing sections name the objects that stand in for them, so that it is a whole recipe."""
    if not isinstance(recipe, Mapping):
        return recipe
    values = dict(recipe)
    if objects.model is not None:
        name = getattr(objects.model.config, "name_or_path", "") or IN_MEMORY
        values["model"] = {"name": name, **values.get("model", {})}
    if objects.train_data is not None:
        values["data"] = {"name": IN_MEMORY, **values.get("data", {})}
    if objects.eval_data is not None:
        data = values.get("data", {})
        values["data"] = {**data, "eval": {"name": IN_MEMORY, **(data.get("eval") or {})}}
    if objects.rewards is not None and len(values.get("rewards", [])) != len(objects.rewards):
        values["rewards"] = [{"path": path_of(function)} for function in objects.rewards]
    return values


def path_of(function: Callable[..., Any]) -> str:
    """`module:name` of a callable, for the written recipe."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"
