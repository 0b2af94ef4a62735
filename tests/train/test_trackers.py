"""Metrics can be read back from TensorBoard's files, and completions from parquet."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_cli.data.prompts import Prompt
from grpo_cli.recipe.load import dump_recipe, load_recipe
from grpo_cli.recipe.schema import Recipe
from grpo_cli.recipe.unused import RUN_NAMES
from grpo_cli.rollout.engine import Completion
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.stored_completions import remove_completions_after, save_completions
from grpo_cli.train.tracked_run import TrackedRun
from grpo_cli.train.trackers import Trackers


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Recipe:
    return load_recipe(tiny_recipe, [f"train.output_dir={tmp_path / 'run'}", "logging.trackers=[tensorboard]"])


def scalars(recipe: Recipe) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(Path(recipe.train.output_dir) / "tensorboard"))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_has_every_finite_metric_of_every_step(recipe: Recipe) -> None:
    trackers = Trackers(recipe, 0, 0, print)
    trackers.log({"step": 1, "reward": 0.5, "rewards/length/mean": 2.0, "kl": math.nan}, 1)
    trackers.log({"step": 2, "reward": -1.25, "rewards/length/mean": 3.0, "kl": 0.5, "ratio": math.inf}, 2)
    trackers.finish(is_done=True)
    assert scalars(recipe) == {
        "step": [(1, 1.0), (2, 2.0)],
        "reward": [(1, 0.5), (2, -1.25)],
        "rewards/length/mean": [(1, 2.0), (2, 3.0)],
        "kl": [(2, 0.5)],
    }


def test_steps_that_are_run_again_after_a_resume_are_there_once(recipe: Recipe) -> None:
    first = Trackers(recipe, 0, 0, print)
    for step in range(1, 5):
        first.log({"reward": float(step)}, step)
    first.finish(is_done=True)
    resumed = Trackers(recipe, 2, 4, print)
    for step in range(3, 6):
        resumed.log({"reward": 10.0 * step}, step)
    resumed.finish(is_done=True)
    assert scalars(recipe)["reward"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_the_home_folder_may_be_written_as_a_tilde(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train = recipe.train.model_copy(update={"output_dir": "~/at-home"})
    trackers = Trackers(recipe.model_copy(update={"train": train}), 0, 0, print)
    trackers.finish(is_done=True)
    assert (tmp_path / "at-home" / "tensorboard").is_dir()
    assert not (tmp_path / "~").exists()


def test_tensorboard_has_the_recipe_as_a_text(recipe: Recipe) -> None:
    Trackers(recipe, 0, 0, print).finish(is_done=True)
    accumulator = EventAccumulator(str(Path(recipe.train.output_dir) / "tensorboard"))
    accumulator.Reload()
    [event] = accumulator.Tensors("recipe/text_summary")
    assert event.tensor_proto.string_val[0].decode() == f"```yaml\n{dump_recipe(recipe)}\n```"


@pytest.mark.parametrize("name", [name for name, option in RUN_NAMES.items() if option])
def test_the_trackers_that_have_projects_take_a_runs_name(name: str) -> None:
    tracker = LOGGER_TYPE_TO_CLASS[name]("project", **{RUN_NAMES[name]: "run"})
    assert "run" in {tracker.__dict__.get("run_name"), *tracker.__dict__.get("init_kwargs", {}).values()}


def test_no_trackers_write_nothing(recipe: Recipe) -> None:
    logging = recipe.logging.model_copy(update={"trackers": []})
    trackers = Trackers(recipe.model_copy(update={"logging": logging}), 0, 0, print)
    trackers.log({"reward": 1.0}, 1)
    trackers.finish(is_done=True)
    assert not Path(recipe.train.output_dir).exists()


def test_a_report_that_cannot_be_made_holds_up_no_tracker(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("nothing to divide by")

    class Plain:
        name, is_finished = "mlflow", False

        def finish(self) -> None:
            self.is_finished = True

    notes: list[str] = []
    trackers = Trackers(recipe, 0, 0, notes.append)
    trackers._runs["mlflow"] = TrackedRun(Plain(), package=object())
    monkeypatch.setattr("grpo_cli.train.trackers.read_run", broken)
    plain = trackers._runs["mlflow"].tracker
    trackers.finish(is_done=True)
    assert plain.is_finished
    assert notes == ["the report for the trackers could not be made: ZeroDivisionError: nothing to divide by"]


def rollout_of(contents: list[Any]) -> Rollout:
    prompts = [Prompt(row, content, [1, 2], {"answer": row}) for row, content in enumerate(contents)]
    completions = [
        Completion([7] * (i + 1), [-0.5] * (i + 1), "length" if i % 2 else "stop", f"completion {i} é")
        for i in range(2 * len(prompts))
    ]
    return Rollout(prompts, completions, 2)


def save(
    folder: Path, step: int, rollout: Rollout, names: list[str], rewards: Any, advantages: Any, **extras: list[Any]
) -> None:
    """Of each completion, only the first token was trained on."""
    policy_logprobs = torch.full((len(rollout.rows), 4), math.nan)
    policy_logprobs[:, 0] = -0.25
    texts = [["é"] * len(one.token_ids) for one in rollout.completions]
    save_completions(
        folder, step, rollout, names, rewards, advantages,
        extras=extras, token_texts=texts, policy_logprobs=policy_logprobs,
    )  # fmt: skip


def test_completions_are_rows_with_their_rewards_and_advantages(tmp_path: Path) -> None:
    rewards = torch.tensor([[1.0, math.nan], [2.0, 0.5], [3.0, 0.25], [4.0, 0.125]], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0, -0.5, 0.5])
    rollout = rollout_of(["first", "second"])
    save(tmp_path, 12, rollout, ["length", "exact"], rewards, advantages)
    save(tmp_path, 13, rollout, ["length", "exact"], rewards, advantages)
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == [
        "step-000012.parquet",
        "step-000013.parquet",
    ]
    table = pq.read_table(tmp_path / "completions" / "step-000012.parquet").to_pydict()
    assert list(table) == [
        "step",
        "prompt",
        "completion",
        "tokens",
        "finish_reason",
        "advantage",
        "reward/length",
        "reward/exact",
        "prompt_ids",
        "completion_ids",
        "logprobs",
        "token_texts",
        "policy_logprobs",
    ]
    assert table["step"] == [12] * 4
    assert table["prompt"] == ["first", "first", "second", "second"]
    assert table["completion"] == [f"completion {i} é" for i in range(4)]
    assert table["tokens"] == [1, 2, 3, 4]
    assert table["finish_reason"] == ["stop", "length", "stop", "length"]
    assert table["advantage"] == advantages.tolist()
    assert table["reward/length"] == [1.0, 2.0, 3.0, 4.0]
    assert math.isnan(table["reward/exact"][0])
    assert table["reward/exact"][1:] == [0.5, 0.25, 0.125]
    assert table["token_texts"] == [["é"] * count for count in (1, 2, 3, 4)]
    assert table["policy_logprobs"] == [[-0.25, None, None, None][:count] for count in (1, 2, 3, 4)]


def test_prompts_that_are_chats_of_any_shape_are_kept_as_json(tmp_path: Path) -> None:
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "Ann"}],
    ]
    save(tmp_path, 1, rollout_of(chats), ["length"], torch.zeros(4, 1), torch.zeros(4))
    table = pq.read_table(tmp_path / "completions" / "step-000001.parquet").to_pydict()
    assert [json.loads(prompt) for prompt in table["prompt"][::2]] == chats


def test_completions_of_steps_that_will_be_run_again_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, rollout_of(["a", "b"]), ["length"], torch.zeros(4, 1), torch.zeros(4))
    remove_completions_after(tmp_path, 2)
    assert sorted(path.stem for path in (tmp_path / "completions").iterdir()) == ["step-000001", "step-000002"]


def test_a_step_that_is_run_again_replaces_its_file(tmp_path: Path) -> None:
    for reward in (1.0, 2.0):
        rewards = torch.full((4, 1), reward)
        save(tmp_path, 1, rollout_of(["a", "b"]), ["length"], rewards, torch.zeros(4))
    table = pq.read_table(tmp_path / "completions" / "step-000001.parquet").to_pydict()
    assert table["reward/length"] == [2.0] * 4
