from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from grpo_cli.errors import UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.verbs.check import check
from tests.conftest import tiny_llama

REWARDS = """\
import json

def score(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **columns):
    log_extra("answer", answer)
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    with open("calls.jsonl", "a") as file:
        call = {"prompts": prompts, "completions": completions, "answer": answer, "ids": completion_ids}
        file.write(json.dumps(call | columns) + "\\n")
    return [1.5, None]
"""


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The tiny recipe with a reward that writes down how it is called, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "my_check", raising=False)
    (tmp_path / "my_check.py").write_text(REWARDS)
    return tiny_recipe | {"rewards": ["my_check:score"]}


def plan_of(recipe: dict[str, Any], *overrides: str) -> dict[str, str]:
    """What `grpo check` prints, by its first word."""
    console = Console(width=400, record=True)
    check(load_recipe(recipe, overrides), console)
    lines = [line.split(maxsplit=1) for line in console.export_text().splitlines()]
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def calls() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]


def test_the_plan_says_what_the_run_will_do(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    count = sum(parameter.numel() for parameter in tiny_llama().parameters())
    plan = plan_of(recipe, "generation.max_completion_tokens=20", "train.prompts_per_step=5", "train.max_steps=4")
    assert plan["model"] == f"{recipe['model']['name']} in float32"
    assert plan["data"] == "10 prompts (texts); columns for rewards: answer"
    assert plan["step"] == "5 prompts x 4 = 20 completions of up to 20 tokens, 1 optimizer step"
    assert plan["run"] == f"4 steps, 2 passes over the prompts, 1 process, into {recipe['train']['output_dir']}"
    assert plan["tokens"] == "up to 400 sampled in a step, 1600 in the run"
    assert plan["memory"].startswith("2.5 GiB on a GPU of 80 GiB (assumed; --gpu-memory says otherwise)")
    assert plan["parameters"] == f"{count:,}, by config.json"
    assert plan["reward"] == "score, weight 1: 1.5 for 'A short sample completion.'"
    assert plan["the"] == "recipe is fine"


def test_epochs_are_turned_into_steps(recipe: dict[str, Any]) -> None:
    recipe["train"] |= {"max_steps": None, "epochs": 2.0, "prompts_per_step": 3}
    assert plan_of(recipe)["run"].startswith("7 steps, 2.1 passes over the prompts")


def test_held_out_prompts_and_adapters_are_in_the_plan(recipe: dict[str, Any]) -> None:
    plan = plan_of(recipe, f"data.eval.name={recipe['data']['name']}", "data.eval.limit=4", "model.lora={}")
    assert plan["evaluation"] == "4 prompts"
    assert plan["model"].endswith("in float32, LoRA")
    assert plan["gradients"] == "64.0 KiB: 16,384 x 4 bytes"


def test_each_reward_is_called_once_on_a_sample_row_with_its_columns(recipe: dict[str, Any]) -> None:
    plan_of(recipe)
    (call,) = calls()
    assert call["prompts"] == ["question 0:"] * 2
    assert call["answer"] == ["0"] * 2
    assert all(isinstance(text, str) for text in call["completions"])
    assert len(call["ids"]) == 2


def test_a_reward_of_chats_is_tried_on_messages(recipe: dict[str, Any]) -> None:
    plan = plan_of(recipe, "data.system_prompt=Be brief.")
    (call,) = calls()
    assert plan["data"].startswith("10 prompts (chats)")
    assert [message["role"] for message in call["prompts"][0]] == ["system", "user"]
    assert [message["role"] for message in call["completions"][0]] == ["assistant"]


def test_a_reward_that_does_not_apply_is_shown_as_none(recipe: dict[str, Any]) -> None:
    Path("my_check.py").write_text("def score(completions, **_): return [None] * len(completions)\n")
    assert plan_of(recipe)["reward"].startswith("score, weight 1: None for ")


def test_text_in_brackets_is_printed_as_it_is(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert plan_of(recipe, f"train.output_dir={tmp_path}/[bold]run")["run"].endswith("/[bold]run")


def test_every_row_is_checked_not_only_the_first(recipe: dict[str, Any]) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}]}] * 3 + [{"prompt": []}]
    Path("d.jsonl").write_text("".join(json.dumps(row | {"answer": ""}) + "\n" for row in rows))
    with pytest.raises(UserError, match="row 4 has an empty list of messages"):
        plan_of(recipe, "data.name=d.jsonl")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.name=my_check:make", "optim.name: my_check has no make"),
        ("loss.type=my_check:los", "loss.type: my_check has no los"),
        ("loss.type=my_check:score", "loss.type: my_check:score cannot be called with (logprobs, old_logprobs, "),
        ("train.callbacks=[my_check:Watch]", "train.callbacks.0: my_check has no Watch"),
        ("train.callbacks=[my_check:json]", "has none of the methods on_train_start"),
        ("model.name=./nowhere", "model.name: there is no folder ./nowhere"),
        ("data.eval.name=nowhere.jsonl", "data.eval.name: no such file: nowhere.jsonl"),
        ("rewards.0=my_check:scor", "rewards.0: my_check has no scor; did you mean score?"),
        ("data.columns={answer: gold}", "reward score needs the column answer"),
    ],
)
def test_what_training_would_stumble_over_is_found(recipe: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(recipe, override)
    assert message in str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_file_decides_the_strategy_of_the_plan(
    recipe: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    own = tmp_path / "deepspeed.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    settings = ("distributed.processes=4", f"distributed.deepspeed_config={own}")
    assert f"on each of 4 GPUs (zero{stage})" in plan_of(recipe, *settings)["memory"]


def test_a_deepspeed_file_that_is_not_there_is_found(recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the DeepSpeed file missing\.json cannot be read"):
        plan_of(recipe, "distributed.deepspeed_config=missing.json")


class Board:
    """An environment that scores itself, and counts those that are open."""

    open = 0

    def __init__(self) -> None:
        type(self).open += 1

    def reset(self, side: str, **columns: Any) -> str:
        return f"You are {side}."

    def respond(self, text: str) -> None: ...

    def get_reward(self) -> float:
        return 0.25

    def close(self) -> None:
        type(self).open -= 1


@pytest.fixture
def played(recipe: dict[str, Any], tiny_model_dir: Path) -> dict[str, Any]:
    """The recipe with an environment and no other rewards."""
    rows = [{"prompt": [{"role": "user", "content": "Move."}], "side": side} for side in ("white", "black")]
    Path("games.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe |= {"rewards": [], "episode": {"environment": "tests.verbs.test_check:Board"}}
    recipe["data"] = {"name": "games.jsonl"}
    recipe["model"] = {"name": str(tiny_model_dir)}
    return recipe


def test_an_environment_is_reset_shown_asked_for_its_reward_and_closed(played: dict[str, Any]) -> None:
    assert plan_of(played)["reward"].startswith("Board, weight 1: 0.25")
    assert Board.open == 0


def test_an_environment_is_checked_as_far_as_can_be_without_the_tokenizer(played: dict[str, Any]) -> None:
    played["model"]["name"] = "nobody/nothing"
    assert "reward" not in plan_of(played)
    assert Board.open == 0


def test_held_out_rows_that_an_environment_cannot_begin_with_are_found(played: dict[str, Any]) -> None:
    Path("eval.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "Move."}]}) + "\n")
    with pytest.raises(UserError, match="reset of Board needs the column side"):
        plan_of(played, "data.eval.name=eval.jsonl")


def test_check_writes_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    plan_of(recipe)
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "calls.jsonl"}


def test_check_does_without_torch(recipe: dict[str, Any], tmp_path: Path) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = (
        "import sys; sys.argv = ['grpo', 'check', 'recipe.yaml']; from grpo_cli import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the recipe is fine" in done.stdout
    assert done.stderr == ""


def test_help_does_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['grpo', 'train', '--help']; from grpo_cli import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: grpo train" in done.stdout
