"""`grpo eval`: a model on the recipe's held-out prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import UserError, one_line
from grpo_cli.policy.export import saved_weights
from grpo_cli.policy.files import locate_gguf
from grpo_cli.recipe.schema import ModelConfig, Recipe
from grpo_cli.record.metrics import Metrics, finite_or_none
from grpo_cli.train.assemble import assemble, check_whole
from grpo_cli.train.guards import explained_failures
from grpo_cli.train.learner import Learner
from grpo_cli.train.objects import Objects


def eval_model(
    recipe: Recipe,
    model: str | None,
    pass_at: Sequence[int],
    pass_reward: float,
    as_json: bool,
    console: Console,
) -> Metrics:
    """Evaluate and print.

    Args:
        recipe: with `data.eval`.
        model: Hub id, folder or checkpoint to evaluate in place of the recipe's model.
        pass_at: the k of pass@k; 1 and `num_generations` if empty.
        pass_reward: least weighted reward of a correct completion.
        as_json: print one JSON object in place of a table.
        console: where to print.

    Raises:
        UserError: there is no `data.eval`, or a k exceeds `num_generations`.
    """
    if recipe.data.eval is None:
        raise UserError("grpo eval needs data.eval; add it to the recipe, or --set data.eval.name=...")
    size = recipe.generation.num_generations
    too_many = [k for k in pass_at if not 1 <= k <= size]
    if too_many:
        raise UserError(f"--pass-at {too_many[0]}: k lies between 1 and generation.num_generations ({size})")
    if not math.isfinite(pass_reward):
        raise UserError(f"--pass-reward {pass_reward}: must be a finite number")
    if model is not None:
        locate_gguf(model, None, setting="--model")
        check_whole(Path(model), "--model", Ranks())
    adapter = None
    if model is not None and (Path(model).expanduser() / "adapter_config.json").is_file():
        adapter = Path(model).expanduser()
        if recipe.model.lora is None:
            raise UserError(f"--model {model} is a LoRA checkpoint, and the recipe has no model.lora")
    elif model is not None:
        recipe = recipe.model_copy(update={"model": without_training(recipe.model, model)})
    with explained_failures(recipe):
        rollouts, learner = assemble(recipe, Objects(), Ranks(), with_reference=False)
    with closing(rollouts.engine):
        if adapter is not None:
            _load_adapter(learner, adapter)
        metrics = rollouts.evaluate(0, pass_at, pass_reward)
    if as_json:
        console.print_json(json.dumps(finite_or_none(metrics)))
        return metrics
    assert rollouts.eval_dataset is not None
    table = Table(title=f"{model or recipe.model.name} on {len(rollouts.eval_dataset)} prompts")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name.removeprefix("eval_"), f"{value:.4g}")
    console.print(table)
    return metrics


def _load_adapter(learner: Learner, folder: Path) -> None:
    try:
        learner.model.load_state_dict(saved_weights(learner.model, folder), strict=False)
    except Exception as error:  # a damaged file can end in any exception of PEFT and safetensors
        name = learner.recipe.model.name
        raise UserError(
            f"--model {folder}: the adapter cannot be loaded into {name} with this model.lora\n"
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


def without_training(config: ModelConfig, name: str) -> ModelConfig:
    """The model section for another model that is used as it is."""
    update = {"name": name, "revision": None, "gguf_file": None, "tokenizer": None, "lora": None}
    return config.model_copy(update=update)
