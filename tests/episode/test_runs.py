"""Whole runs of episodes: their numbers follow from the seed, however long answers take and whoever plays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import grpo_cli
from grpo_cli.errors import RunError, UserError
from grpo_cli.record.completions import completions_file, read_completions
from grpo_cli.record.metrics import TIMES, read_metrics
from tests.episode.small_talk import small_talk
from tests.processes import run_ranks

pytestmark = pytest.mark.slow

ENVIRONMENT = {"path": "tests.episode.small_talk:SmallTalk"}
ROUNDED = ("sampling/",)
"""How far the engine's log-probabilities are from training's: some 1e-7, which depends on the rows that were
computed beside a row, and so on when its answer came."""


def numbers(folder: Path, but: tuple[str, ...] = TIMES) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(but)} for row in rows]


def stored(folder: Path, step: int) -> list[dict[str, Any]]:
    """What was said, without its log-probabilities."""
    rows: list[dict[str, Any]] = pq.read_table(completions_file(folder, step)).to_pylist()
    for row in rows:
        del row["policy_logprobs"]
        for part in (row, *row["earlier"]):
            del part["logprobs"]
    return rows


def assert_same_weights(one: Any, other: Any) -> None:
    weights = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def assert_on_policy(folder: Path) -> None:
    """What was sampled in the last row of an episode is trained on with the log-probabilities that sampled it, and
    nothing else is."""
    for one in read_completions(folder, 1, 4):
        for is_sampled, sampler, policy in zip(one.sampled, one.logprobs, one.policy_logprobs, strict=True):
            assert policy == (pytest.approx(sampler, abs=1e-5) if is_sampled else None)


def train(recipe: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Any:
    values = json.loads(json.dumps(recipe))
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    values["train"]["output_dir"] = str(folder)
    return grpo_cli.train(values)


@pytest.mark.parametrize("rewrites", [False, True])
def test_tools_that_take_other_times_change_no_token_and_no_weight(rewrites: bool, tmp_path: Path) -> None:
    recipe = small_talk(tmp_path / "model", tmp_path / "run", rewrites=rewrites)
    first, *others = [
        train(recipe, tmp_path / f"run-{number}", episode={"environment": ENVIRONMENT | {"params": pauses}})
        for number, pauses in enumerate([{}, {"longest_pause_s": 0.05}, {"longest_pause_s": 0.05}])
    ]
    assert first.metrics[0]["rollout/turns_mean"] > 2
    for other in others:
        assert numbers(other.output_dir, TIMES + ROUNDED) == numbers(first.output_dir, TIMES + ROUNDED)
        assert_same_weights(first, other)
        for step in (1, 2, 3):
            assert stored(other.output_dir, step) == stored(first.output_dir, step)
        for row, like in zip(other.metrics, first.metrics, strict=True):
            for name in row:
                if name.startswith(ROUNDED):
                    assert row[name] == pytest.approx(like[name], abs=1e-5)


@pytest.mark.parametrize("rewrites", [False, True])
def test_a_replay_of_episodes_ends_with_the_same_weights(rewrites: bool, tmp_path: Path) -> None:
    recipe = small_talk(tmp_path / "model", tmp_path / "run", rewrites=rewrites)
    recipe["loss"] = {"beta": 0.1, "sampler_correction": {}}
    recipe["rewards"] = ["rewards.length:reward_len", "tests.episode.small_talk:most_talk"]
    run = train(recipe, tmp_path / "run")
    again = train(recipe, tmp_path / "again", generation={"engine": "replay", "replay": str(tmp_path / "run")})
    assert_same_weights(run, again)
    played = (*TIMES, "tools/", "env/", "rollout/")
    assert numbers(again.output_dir, played) == numbers(run.output_dir, played)
    rows = stored(run.output_dir, 1)
    assert max(len(row["earlier"]) for row in rows) >= (2 if rewrites else 0)
    assert any(row["sampled"] and not all(row["sampled"]) for row in rows) != rewrites
    assert stored(again.output_dir, 1) == rows
    assert_on_policy(run.output_dir)


def test_a_replay_of_the_episodes_of_other_prompts_is_refused(tmp_path: Path) -> None:
    recipe = small_talk(tmp_path / "model", tmp_path / "run")
    rows = [{"prompt": [{"role": "user", "content": f"Day {day}."}]} for day in range(9)]
    (tmp_path / "days.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["data"] = {"name": str(tmp_path / "days.jsonl")}
    train(recipe, tmp_path / "run")
    stored_run = {"engine": "replay", "replay": str(tmp_path / "run")}
    train(recipe, tmp_path / "the same", generation=stored_run)
    again = recipe["train"] | {"seed": 7}
    with pytest.raises(RunError, match=r"does not hold 4 completions of prompt \d of step 1"):
        train(recipe, tmp_path / "again", generation=stored_run, train=again)


def test_a_replay_of_episodes_whose_environments_did_not_say_as_much_is_refused(tmp_path: Path) -> None:
    recipe = small_talk(tmp_path / "model", tmp_path / "run")
    train(recipe, tmp_path / "run")
    recipe["rewards"] = ["tests.episode.small_talk:most_talk"]
    stored_run = {"engine": "replay", "replay": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"has no column reward/most_talk, and there are no environments"):
        train(recipe, tmp_path / "again", generation=stored_run)


def test_two_processes_train_on_the_episodes_of_one(tmp_path: Path) -> None:
    """Environments are scored by the process in which they are: `SmallTalk` sees to it."""
    recipe = small_talk(tmp_path / "model", tmp_path / "one")
    recipe["rewards"] = ["tests.episode.small_talk:most_talk"]
    one = train(recipe, tmp_path / "one")
    recipe["train"]["output_dir"] = str(tmp_path / "two")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"distributed": {"strategy": "ddp"}}))
    codes, output = run_ranks(2, "train", path)
    assert codes == [0, 0], output
    rows, wanted = (numbers(run, TIMES + ROUNDED) for run in (tmp_path / "two", one.output_dir))
    assert len(rows) == len(wanted) == 3
    for row, like in zip(rows, wanted, strict=True):
        assert row == pytest.approx(like, rel=1e-5, abs=1e-5)
    for step in (1, 2, 3):
        assert stored(tmp_path / "two", step) == stored(one.output_dir, step)
