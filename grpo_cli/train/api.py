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
from grpo_cli.recipe.schema import Recipe
from grpo_cli.recipe.strategies import STRATEGIES
from grpo_cli.report.curves import change
from grpo_cli.report.findings import WORTH_TELLING, find
from grpo_cli.report.run import read_run
from grpo_cli.rollout.rollout import Rollout, generate_rollout
from grpo_cli.train.assemble import assemble, notes
from grpo_cli.train.checkpoint import save_final
from grpo_cli.train.display import Display
from grpo_cli.train.guards import deterministic_kernels, explained_failures, warn_of_idle_gpu
from grpo_cli.train.learner import Learner
from grpo_cli.train.loop import train_loop
from grpo_cli.train.objects import Engine, Objects, recipe_with_objects
from grpo_cli.train.recorder import Recorder
from grpo_cli.train.rollouts import Rollouts
from grpo_cli.train.run_folder import check_run_folder
from grpo_cli.train.signals import StopRequest, compile_in_this_process
from grpo_cli.train.trackers import check_trackers

SHOWCASE_STREAM = 2
"""The completions that are shown before and after training draw from this stream of random numbers."""

MOST_FINDINGS = 3
"""What looks wrong in a run, that its end tells of."""


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
    engine: Engine | None = None,
    tools: Sequence[Callable[..., Any]] | None = None,
    environment: Any = None,
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
        engine: what generates, in place of `generation.engine`: an object with the methods of `TurnEngine` or
            `RolloutEngine`, or a function that is given the recipe's engine and returns the one to use.
        tools: functions that the policy may call, in place of `episode.tools`.
        environment: the class of each episode's environment, or classes by name, of which each row's column
            `environment` names one; in place of `episode.environment`.
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
    objects = Objects(
        model, tokenizer, functions, train_data, eval_data, callbacks, optimizer, engine, tools, environment
    )
    loaded = recipe_with_objects(recipe, objects, overrides)
    strategy = resolve_strategy(loaded.distributed, os.environ)
    ranks = Ranks.join(needs_group=STRATEGIES[strategy].needs_group)
    console = (console or Console()) if ranks.is_main else Console(quiet=True)
    ranks.led(lambda: check_trackers(loaded.logging.trackers))

    def note(text: str) -> None:
        console.print(escape(text), soft_wrap=True)

    warn_of_idle_gpu(console)
    ranks.led(lambda: check_run_folder(loaded, resume=resume, note=note))
    compile_in_this_process()
    with explained_failures(loaded), deterministic_kernels(), ranks.leaving_together():
        rollouts, learner = assemble(loaded, objects, ranks, strategy, note=note)
        with (
            StopRequest() as stop_request,
            Display(console, rollouts.max_steps, loaded.logging.every) as display,
            _closed_at_the_end(rollouts, display),
            closing(Recorder(loaded, rollouts, learner, callbacks, stop_request, display)) as recorder,
        ):
            recorder.open(learner)
            return _train_or_stop(rollouts, learner, recorder)


@contextmanager
def _closed_at_the_end(rollouts: Rollouts, display: Display) -> Iterator[None]:
    try:
        yield
    finally:
        with display.noting():
            rollouts.engine.close()


def _train_or_stop(rollouts: Rollouts, learner: Learner, recorder: Recorder) -> TrainResult:
    """Train; where a server is lost, with a checkpoint as the end."""
    try:
        return _train(rollouts, learner, recorder)
    except ServerLost as lost:
        if isinstance(lost, ServerNeverReached) and recorder.resumed_from is None:
            raise UserError(str(lost)) from lost
        recorder.save_checkpoint(learner)
        raise StoppedEarly(
            f"{lost}\nstopped after step {recorder.position.step}; continue with --resume"
        ) from lost


def _train(rollouts: Rollouts, learner: Learner, recorder: Recorder) -> TrainResult:
    display = recorder.display
    for note in notes(rollouts, learner):
        display.note(note)
    if recorder.resumed_from is not None:
        display.note(f"resuming from {recorder.resumed_from}")
    before = None
    if recorder.position.step == 0:
        rollouts.engine.update_weights(0)  # a server that is not there is found before anything has begun
        before = _showcase(rollouts, 0)
    recorder.start()
    train_loop(rollouts.recipe, rollouts, learner, recorder)
    with display.noting():
        recorder.notify("on_train_end")
    final = save_final(recorder.folder, learner)
    recorder.is_done = True
    after = None
    # What fails on one of several ranks alone leaves the others waiting: it has to end the process.
    with display.noting(Exception if learner.ranks.world_size == 1 else EXPECTED_ERRORS):
        after = _showcase(rollouts, recorder.position.step)
    with display.noting():
        for title, rollout in (("before training", before), ("after training", after)):
            if rollout is not None and learner.ranks.is_main:
                scorer = rollouts.scorer
                step = recorder.position.step
                scored = scorer.score(rollout.scoring_batch(), step=step, state=rollouts.state(step))
                scores = torch.from_numpy(scored)
                display.completions(title, rollout, scorer.names, scores)
    history = recorder.history()
    _say_how_it_went(recorder, history, final)
    return TrainResult(recorder.folder, history, learner.model, learner.tokenizer)


def _say_how_it_went(recorder: Recorder, history: Sequence[dict[str, Any]], final: Path) -> None:
    """Say what was learned and where everything is."""
    folder, note = recorder.folder, recorder.display.note
    reward = change([row["reward"] for row in history])
    if reward is not None:
        note(f"mean reward:  {reward}")
    note(f"final model:  {final}")
    note(f"metrics:      {folder / 'metrics.jsonl'} (also: tensorboard --logdir {folder})")
    note(f"completions:  {folder / 'completions'}")
    if history:
        with recorder.display.noting():
            _say_what_looks_wrong(recorder)


def _say_what_looks_wrong(recorder: Recorder) -> None:
    """A line for each of the worst findings that cost learning."""
    worst = [one for one in find(read_run(recorder.folder)) if one.badness >= WORTH_TELLING][:MOST_FINDINGS]
    for finding in worst:
        recorder.display.note(f"looks wrong:  {finding.figure}")
    if worst:
        recorder.display.note(f"              what it means, and what to change: grpo report {recorder.folder}")


def _showcase(rollouts: Rollouts, step: int) -> Rollout | None:
    """One completion for each of three prompts, the same ones whenever it is called; None if none are shown."""
    recipe = rollouts.recipe
    if not recipe.logging.print_completions or not rollouts.generates:
        return None
    rollouts.engine.update_weights(step)
    data = rollouts.eval_dataset or rollouts.dataset
    prompts = [data[index] for index in range(min(3, len(data)))]
    return generate_rollout(rollouts.engine, prompts, (recipe.train.seed, SHOWCASE_STREAM), 1)
