"""Settings that a run does not use, though nothing is wrong with them: they are told, not refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grpo_cli.recipe.schema import Recipe

RUN_NAMES = {
    "wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name", "clearml": "task_name",
    "comet_ml": None,
}  # fmt: skip
"""Trackers that have projects, and their option for the name of a run in one, if there is one."""


def unused_settings(recipe: Recipe, *, conversational: bool) -> Iterator[str]:
    """Yield a line for each setting that another one leaves without effect.

    `recipes/gsm8k.yaml` names a Hub configuration; `--set data.name=train.jsonl` leaves it without a meaning.
    """
    for key, data in (("data", recipe.data), ("data.eval", recipe.data.eval)):
        if data is not None and data.config is not None and Path(data.name).expanduser().is_file():
            yield f"{key}.config ({data.config}) is not used: {data.name} is a file"
    if recipe.model.revision is not None and Path(recipe.model.name).expanduser().exists():
        yield f"model.revision ({recipe.model.revision}) is not used: {recipe.model.name} is on this machine"
    if not conversational and (recipe.model.chat_template or recipe.model.chat_template_kwargs):
        yield "model.chat_template is not used: the prompts are plain texts"
    if recipe.logging.project is not None and not RUN_NAMES.keys() & recipe.logging.trackers:
        yield f"logging.project ({recipe.logging.project}) is not used: none of logging.trackers has projects"
