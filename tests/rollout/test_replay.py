"""A run that trains again on what another has stored is that run; what it cannot replay, it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import grpo_cli
from grpo_cli.errors import RunError, UserError
from grpo_cli.recipe.schema import Recipe
from grpo_cli.record.completions import completions_file
from grpo_cli.verbs.check import check

TIMES = ("time/", "tokens_per_second")


def changed(recipe: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(recipe))
    for name, section in (sections | {"train": {"output_dir": str(folder)} | sections.get("train", {})}).items():
        values[name] = values.get(name, {}) | section
    return values


def numbers(result: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in result.metrics]


@pytest.fixture
def stored(tiny_recipe: dict[str, Any], tmp_path: Path) -> Any:
    tiny_recipe["generation"]["top_k"] = 50
    tiny_recipe["loss"] = {"drop_zero_variance_groups": "resample"}
    return grpo_cli.train(changed(tiny_recipe, tmp_path / "stored"))


def replay(recipe: dict[str, Any], stored: Any, folder: Path, **sections: dict[str, Any]) -> Any:
    generation = {"engine": "replay", "replay": str(stored.output_dir)} | sections.pop("generation", {})
    return grpo_cli.train(changed(recipe, folder, generation=generation, **sections))


def test_a_replay_is_the_run_but_for_its_generation(
    tiny_recipe: dict[str, Any], stored: Any, tmp_path: Path
) -> None:
    again = replay(tiny_recipe, stored, tmp_path / "again", logging={"print_completions": 2})
    assert numbers(again) == numbers(stored)
    weights = stored.model.state_dict()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for step in (1, 2, 3):
        one, other = (pq.read_table(completions_file(run.output_dir, step)) for run in (stored, again))
        assert one.equals(other)


def test_another_loss_may_be_tried_on_the_same_completions(
    tiny_recipe: dict[str, Any], stored: Any, tmp_path: Path
) -> None:
    again = replay(tiny_recipe, stored, tmp_path / "again", loss={"scale_rewards": "none"})
    assert [row["reward"] for row in again.metrics] == [row["reward"] for row in stored.metrics]
    assert again.metrics[0]["grad_norm"] != pytest.approx(stored.metrics[0]["grad_norm"])


def test_other_prompts_than_the_stored_ones_are_named(
    tiny_recipe: dict[str, Any], stored: Any, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"step-000001\.parquet does not hold 4 completions of prompt 0 of step 1"):
        replay(tiny_recipe, stored, tmp_path / "again", train={"seed": 7})
    with pytest.raises(RunError, match="num_generations must be that run's"):
        replay(tiny_recipe, stored, tmp_path / "smaller", generation={"num_generations": 3})


def test_a_run_that_is_too_short_or_too_old_is_refused_before_the_first_step(
    tiny_recipe: dict[str, Any], stored: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"generation\.replay: .*step-000004\.parquet is not there"):
        replay(tiny_recipe, stored, tmp_path / "long", train={"max_steps": 4})
    recipe = Recipe.model_validate(
        tiny_recipe | {"generation": {"engine": "replay", "replay": str(stored.output_dir)}}
    )
    check(recipe, Console(quiet=True))
    path = completions_file(stored.output_dir, 1)
    pq.write_table(pq.read_table(path).drop_columns(["logprobs"]), path)
    with pytest.raises(UserError, match="has no column logprobs; an older version wrote it"):
        replay(tiny_recipe, stored, tmp_path / "old")
    with pytest.raises(UserError, match="has no column logprobs"):
        check(recipe, Console(quiet=True))
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"generation\.replay: .*step-000001\.parquet cannot be read"):
        replay(tiny_recipe, stored, tmp_path / "damaged")
