"""Runs whose reward functions ask where they stand and log: TRL's own, unchanged, and others, in every setting."""

from __future__ import annotations

import inspect
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import grpo_cli
from grpo_cli.errors import StoppedEarly
from grpo_cli.recipe.load import load_recipe
from grpo_cli.record.completions import completions_file, read_completions
from grpo_cli.record.metrics import METRICS, TIMES, is_own_metric, read_metrics
from grpo_cli.reward.registry import reward_from_callable
from grpo_cli.reward.scorer import RewardError, Scorer, ScoringBatch
from grpo_cli.rollout.engine import Completion
from grpo_cli.train.metrics import episode_metrics
from grpo_cli.verbs.check import check
from grpo_cli.verbs.evaluate import eval_model
from grpo_cli.verbs.sample import sample
from tests.golden import trl_docs_reward_functions as trl
from tests.processes import run_ranks
from tests.reward import trl_shapes
from tests.train.test_trackers import rollout_of, save

ON_CHATS = (
    trl.accuracy_reward,
    trl.reasoning_accuracy_reward,
    trl.think_format_reward,
    trl.get_cosine_scaled_reward(max_len=8),
    trl.get_repetition_penalty_reward(),
    trl.get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4),
    trl_shapes.has_think_tags,
)

HOOKED = """\
def hooked(completions, answer, trainer_state, log_extra, log_metric):
    log_extra("answer", answer)
    log_extra("mixed", [None, 1, 2.5][:1] + [len(text) for text in completions[1:]])
    log_metric("seen/step", trainer_state.global_step)
    log_metric("seen/tokens", trainer_state.num_input_tokens_seen)
    log_metric("seen/nothing", float("nan"))
    return [len(set(text)) * (1 + trainer_state.global_step) for text in completions]
"""


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The tiny recipe with a reward that uses all of the hooks, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "my_hooks", raising=False)
    (tmp_path / "my_hooks.py").write_text(HOOKED)
    return tiny_recipe | {"rewards": ["my_hooks:hooked"]}


def changed(recipe: dict[str, Any], name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(recipe))
    train = {"output_dir": str(Path(recipe["train"]["output_dir"]).with_name(name))}
    for key, section in (sections | {"train": sections.get("train", {}) | train}).items():
        values[key] = values.get(key, {}) | section
    return values


def timeless(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / METRICS)
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def tables(folder: Path) -> list[pa.Table]:
    return [pq.read_table(path) for path in sorted((folder / "completions").glob("*.parquet"))]


@pytest.mark.parametrize("module", ["accuracy_rewards", "format_rewards", "other_rewards"])
def test_the_functions_of_trls_reference_are_trls(module: str) -> None:
    theirs = pytest.importorskip(f"trl.rewards.{module}", reason="TRL is not installed")
    defined = [one for one in vars(theirs).values() if getattr(one, "__module__", None) == theirs.__name__]
    assert defined
    for one in defined:
        assert inspect.getsource(one) == inspect.getsource(getattr(trl, one.__name__)), one.__name__


def test_the_functions_of_trls_reference_give_what_their_docstrings_say() -> None:
    third, half = r"\frac{1}{3}", r"\frac{1}{2}"

    def said(function: Any, *contents: str, **columns: Any) -> list[float]:
        chats = [[{"role": "assistant", "content": content}] for content in contents]
        ids = columns.pop("completion_ids", [[1]] * len(chats))
        batch = ScoringBatch(["p"] * len(chats), chats, ids, columns)
        return Scorer([reward_from_callable(function)]).score(batch, step=1)[:, 0].tolist()

    boxed = [rf"My answer is \boxed{{{value}}}" for value in (third, half)]
    thought = [f"<think> Reasoning </think> {text}" for text in boxed] + [boxed[0]]
    ids = [[1] * 50, [1] * 50]
    assert said(trl.accuracy_reward, *boxed, solution=[third] * 2) == [1.0, 0.0]
    assert said(trl.reasoning_accuracy_reward, *thought, solution=[third] * 3) == [1.0, 0.0, 0.0]
    assert said(trl.think_format_reward, "<think>\na\n</think>\nb", "<think>\na\nb") == [1.0, 0.0]
    cosine = trl.get_cosine_scaled_reward(max_len=100)
    assert said(cosine, *boxed, solution=[third] * 2, completion_ids=ids) == pytest.approx([0.75, -0.75])
    overlong = trl.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert said(overlong, "x", completion_ids=[[1] * 90]) == [-0.5]
    repetition = trl.get_repetition_penalty_reward()
    assert said(repetition, "x", "y", completion_ids=[[1] * 8, [*range(8)]]) == pytest.approx([-5 / 6, 0.0])


def test_a_run_with_all_functions_of_trls_reference(tiny_recipe: dict[str, Any]) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"{i} + 1?"}], "solution": f"{i + 1}" if i % 2 else "?"}
        for i in range(6)
    ]
    del tiny_recipe["rewards"], tiny_recipe["data"]
    result = grpo_cli.train(tiny_recipe, rewards=list(ON_CHATS), train_data=rows)
    last = result.metrics[-1]
    names = {name.split("/")[1] for name in last if name.startswith("rewards/")}
    assert names == {
        "accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "cosine_scaled_reward",
        "repetition_penalty_reward", "soft_overlong_punishment_reward", "has_think_tags",
    }  # fmt: skip
    for one in read_completions(result.output_dir, 3, 4):
        assert one.extras["solution"] == rows[int(one.prompt[0]["content"][0])]["solution"]  # type: ignore[index]
        assert one.extras["answer_parsed"] == "[incomplete reasoning]", "the last of two functions has the word"


@pytest.mark.parametrize("way", [{"workers": 2}, {"isolate": True}])
def test_trls_functions_by_name_in_threads_and_apart(tiny_recipe: dict[str, Any], way: dict[str, Any]) -> None:
    names = ("accuracy_reward", "think_format_reward")
    tiny_recipe["rewards"] = [{"path": f"tests.golden.trl_docs_reward_functions:{name}", **way} for name in names]
    tiny_recipe["train"]["max_steps"] = 1
    del tiny_recipe["data"]
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "solution": str(i + 1)} for i in range(6)]
    result = grpo_cli.train(tiny_recipe, train_data=rows)
    for one in read_completions(result.output_dir, 1, 4):
        assert set(one.extras) == {"solution", "gold_parsed", "answer_parsed"}
        assert one.extras["gold_parsed"] == f"[{one.extras['solution']}, '{one.extras['solution']}']"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_the_shapes_of_trls_guides(tiny_recipe: dict[str, Any], workers: int) -> None:
    rows = [
        {"prompt": f"question {i}:", "ground_truth": str(i), "task": ("math", "coding")[i % 2]} for i in range(6)
    ]
    del tiny_recipe["data"]
    tiny_recipe["rewards"] = [
        {"path": f"tests.reward.trl_shapes:{one.__name__}", "workers": workers} for one in trl_shapes.ON_TEXTS
    ]
    result = grpo_cli.train(tiny_recipe, train_data=rows)
    for step, row in enumerate(result.metrics):
        assert row["accuracy"] == pytest.approx(row["rewards/logs_if_it_may/mean"])
        assert row["seen/epoch"] == step * 3 / 6
    for step in (1, 2, 3):
        for one in read_completions(result.output_dir, step, 4):
            assert one.extras == {
                "golden_answer": one.prompt[9],  # type: ignore[index]
                "extracted_answer": "found" if one.rewards["logs_if_it_may"] else "[none]",
                "step": step - 1,
            }


@pytest.mark.parametrize("way", [{}, {"workers": 2}, {"isolate": True}, {"timeout_s": 60}])
def test_a_run_says_where_it_stands_and_keeps_what_is_logged(recipe: dict[str, Any], way: dict[str, Any]) -> None:
    recipe["rewards"] = [{"path": "my_hooks:hooked", **way}]
    recipe["data"]["eval"] = {"name": recipe["data"]["name"]}
    recipe["train"]["eval_every"] = 3
    result = grpo_cli.train(recipe)
    rows = timeless(result.output_dir)
    assert [row["seen/step"] for row in rows] == [0, 1, 2]
    assert [row["seen/tokens"] for row in rows] == [0, rows[0]["num_tokens"], rows[1]["num_tokens"]]
    assert all(row["seen/nothing"] is None for row in rows)
    assert rows[2]["eval_seen/step"] == 3
    assert rows[2]["eval_seen/tokens"] == rows[2]["num_tokens"]
    own = {name for row in rows for name in row if is_own_metric(name)}
    assert {name for row in rows for name in row} - own == {"seen/step", "seen/tokens", "seen/nothing"}
    for one in read_completions(result.output_dir, 2, 4):
        assert one.prompt == f"question {one.extras['answer']}:"
        assert one.extras["mixed"] is None or one.extras["mixed"] == len(one.text)


def test_every_metric_that_a_run_writes_is_known_as_its_own(tiny_recipe: dict[str, Any]) -> None:
    for kind in ("dapo", "cispo", "sapo", "vespo"):
        loss = {"type": kind, "beta": 0.1, "drop_zero_variance_groups": "resample"}
        result = grpo_cli.train(changed(tiny_recipe, kind, loss=loss, train={"max_steps": 1}))
        assert [name for name in result.metrics[0] if not is_own_metric(name)] == []
    episode = Completion([1], [0.0], "stop", "text", messages=[{"role": "assistant", "content": "text"}])
    assert all(map(is_own_metric, episode_metrics([episode])))


@pytest.mark.parametrize("workers", [0, 2])
def test_rounds_of_resampling_are_one_rollout_and_a_replay_logs_the_same(
    recipe: dict[str, Any], workers: int
) -> None:
    (Path(recipe["train"]["output_dir"]).with_name("my_hooks.py")).write_text(
        HOOKED.replace("len(set(text)) * (1 + trainer_state.global_step)", "float(any(map(str.isdigit, text)))")
    )
    recipe["rewards"] = [{"path": "my_hooks:hooked", "workers": workers}]
    recipe["loss"] = {"drop_zero_variance_groups": "resample"}
    result = grpo_cli.train(recipe)
    assert any(row["resample/rounds"] for row in result.metrics), "otherwise nothing is tested"
    for step in (1, 2, 3):
        for one in read_completions(result.output_dir, step, 4):
            assert one.prompt == f"question {one.extras['answer']}:"
    generation = {"engine": "replay", "replay": str(result.output_dir)}
    again = grpo_cli.train(changed(recipe, "again", generation=generation))
    assert tables(again.output_dir) == tables(result.output_dir)
    assert timeless(again.output_dir) == timeless(result.output_dir)


def test_a_resumed_run_logs_and_scores_what_the_uninterrupted_one_does(recipe: dict[str, Any]) -> None:
    class Stops(grpo_cli.Callback):
        def on_step_end(self, state: Any) -> None:
            if state.step == 2:
                raise StoppedEarly("as a signal")

    whole = grpo_cli.train(changed(recipe, "whole", train={"save_every": 1}))
    broken = changed(recipe, "broken", train={"save_every": 1})
    with pytest.raises(StoppedEarly):
        grpo_cli.train(broken, callbacks=[Stops()])
    resumed = grpo_cli.train(broken, resume=True)
    assert timeless(resumed.output_dir) == timeless(whole.output_dir)
    assert tables(resumed.output_dir) == tables(whole.output_dir)


def test_a_metric_with_a_name_of_the_runs_own_ends_the_run(recipe: dict[str, Any]) -> None:
    (Path(recipe["train"]["output_dir"]).with_name("my_hooks.py")).write_text(
        "def hooked(completions, log_metric):\n    log_metric('entropy', 1.0)\n"
    )
    with pytest.raises(
        RewardError, match="reward hooked, step 1: log_metric: 'entropy' is a metric of the run's own"
    ):
        grpo_cli.train(recipe)


def test_the_other_verbs_give_the_hooks_too(recipe: dict[str, Any]) -> None:
    (Path(recipe["train"]["output_dir"]).with_name("my_hooks.py")).write_text(
        HOOKED + "\nSTATES = []\n"
        "def told(trainer_state, **kwargs):\n"
        "    STATES.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.num_train_epochs))\n"
        "    given = {name: kwargs[name] for name in ('completions', 'answer', 'log_extra', 'log_metric')}\n"
        "    return hooked(trainer_state=trainer_state, **given)\n"
    )
    recipe["rewards"] = ["my_hooks:told"]
    recipe["data"]["eval"] = {"name": recipe["data"]["name"]}
    loaded, console = load_recipe(recipe), Console(quiet=True)
    check(loaded, console)
    sample(loaded, 2, console)
    metrics = eval_model(loaded, None, (), 1.0, True, console)
    assert metrics["eval_seen/step"] == 0
    assert math.isnan(metrics["eval_seen/nothing"])
    assert set(sys.modules["my_hooks"].STATES) == {(0, 3, 1)}


def test_columns_of_any_values_can_be_stored(tmp_path: Path) -> None:
    given: dict[str, list[Any]] = {
        "whole": [1, None, 3, 4],
        "real": [1, 2.5, None, math.inf],
        "yes": [True, None, False, True],
        "text": ["a", None, "", "é"],
        "mixed": [1, "two", True, None],
        "nothing": [None] * 4,
        "large": [2**53 + 1, 0.5, 1, 2],
    }
    save(tmp_path, 1, rollout_of(["a", "b"]), ["r"], torch.zeros(4, 1), torch.zeros(4), **given)
    table = pq.read_table(completions_file(tmp_path, 1))
    stored = {
        name.removeprefix("extra/"): table[name].to_pylist() for name in table.column_names if "extra/" in name
    }
    wanted = given | {
        "real": [1.0, 2.5, None, math.inf],
        "mixed": ["1", "two", "true", None],
        "large": [2.0**53, 0.5, 1, 2],
    }
    assert stored == wanted


@pytest.mark.slow
def test_what_each_of_several_processes_logs_is_in_the_files_of_the_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    prompts = tmp_path / "tasks.jsonl"
    rows = [{"prompt": f"question {i}:", "ground_truth": str(i)} for i in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shapes = "tests.reward.trl_shapes"
    tiny_recipe |= {
        "data": {"name": str(prompts)},
        "rewards": [
            {"path": f"{shapes}:logs_if_it_may", "workers": 2},
            {"path": f"{shapes}:takes_all_by_kwargs", "workers": 1, "isolate": True},
            f"{shapes}:curriculum",
        ],
    }
    folders = []
    for processes in (1, 2):
        folders.append(tmp_path / f"by-{processes}")
        recipe = changed(tiny_recipe, folders[-1].name)
        file = tmp_path / f"{processes}.yaml"
        file.write_text(json.dumps(recipe))
        codes, output = run_ranks(processes, "train", str(file))
        assert codes == [0] * processes, output
    for step in (1, 2, 3):
        one, two = (read_completions(folder, step, 4) for folder in folders)
        assert [row.extras for row in two] == [row.extras for row in one]
        assert all(row.extras["golden_answer"] == row.prompt[9] for row in two)  # type: ignore[index]
    one_rows, two_rows = map(timeless, folders)
    for name in ("accuracy", "seen/epoch", "rewards/curriculum/mean"):
        assert [row[name] for row in two_rows] == [row[name] for row in one_rows]
