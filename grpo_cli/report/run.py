"""What is known of a run afterwards, or while it goes on: its recipe, its numbers, its completions. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_cli.errors import UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import Recipe
from grpo_cli.record.completions import StoredCompletion, read_completions, stored_steps
from grpo_cli.record.metrics import METRICS, read_metrics


@dataclass(frozen=True)
class Run:
    folder: Path
    recipe: Recipe
    rows: Sequence[dict[str, Any]]
    """Of `metrics.jsonl`, a step each; numbers that were not finite are None."""
    is_finished: bool
    """Whether its final model is written."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def group_size(self) -> int:
        return self.recipe.generation.num_generations

    @property
    def steps(self) -> list[int]:
        """Of the rows, counted from 1."""
        return [row["step"] for row in self.rows]

    @cached_property
    def metric_names(self) -> list[str]:
        """In the order in which they came up."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    @cached_property
    def reward_names(self) -> list[str]:
        """Of the reward functions, in the order of the recipe."""
        parts = (name.split("/") for name in self.metric_names if name.startswith("rewards/"))
        return list(dict.fromkeys("/".join(middle) for _, *middle, last in parts if last == "mean"))

    def series(self, name: str) -> list[float | None]:
        """A metric, a value for each row; None where it has none."""
        return [row.get(name) for row in self.rows]

    def points(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a metric has a value, and the values: of evaluations, which are not at every step."""
        found = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    @cached_property
    def stored_steps(self) -> list[int]:
        """The steps whose completions can be read, in order; of a run that goes on, the steps of `rows` only."""
        done = self.rows[-1]["step"] if self.rows else 0
        return [step for step in stored_steps(self.folder) if step <= done]

    def completions(self, step: int, places: Sequence[int] | None = None) -> list[StoredCompletion]:
        """See `read_completions`."""
        return read_completions(self.folder, step, self.group_size, places=places)

    def texts(self, step: int) -> list[StoredCompletion]:
        """`completions` without their tokens, for which the memory of a large step would not do."""
        return read_completions(self.folder, step, self.group_size, with_tokens=False)


def read_run(folder: Path) -> Run:
    """Read a run's folder, whether it is done, goes on or died.

    Raises:
        UserError: it is not the folder of a run, or has not finished a step.
        RunError: a file in it is damaged.
    """
    recipe_file = folder / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no recipe.yaml")
    metrics = folder / METRICS
    rows = read_metrics(metrics) if metrics.is_file() else []
    if not rows:
        raise UserError(f"{folder}: the run has not finished a step: there is nothing to report")
    return Run(folder, load_recipe(recipe_file), rows, (folder / "final").is_dir())
