"""What TRL documents of `tools`, `environment_factory` and rewards runs as it is, from the command line too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import grpo_cli
from grpo_cli.record.metrics import read_metrics
from grpo_cli.rollout.engine import Turn
from tests.episode.chat import chat_tokenizer
from tests.episode.scripted import Scripted
from tests.episode.small_talk import save_model
from tests.episode.trl_shapes import (
    CounterEnv,
    JudgedEnv,
    SilentEnv,
    async_add,
    async_reward,
    calls_reward,
    counter_reward,
    multiply,
)
from tests.processes import Command

pytestmark = pytest.mark.slow

SHAPES = "tests.episode.trl_shapes"
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Task {number}."}],
        "goal": number,
        "environment": ("counter", "silent", "judged")[number % 3],
    }
    for number in range(6)
]
SEVERAL = {"counter": CounterEnv, "silent": SilentEnv, "judged": JudgedEnv}


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "qwen2_5")
    return folder


def recipe_of(model: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(model)},
        "generation": {"num_generations": 2, "max_completion_tokens": 300},
        "train": {"output_dir": str(folder / "run"), "max_steps": 2, "prompts_per_step": 3},
        "data": {"shuffle": False},
        "logging": {"trackers": [], "print_completions": 0},
    }


def grpo(*arguments: str | Path) -> str:
    process = Command(*arguments, environment=os.environ | {"OMP_NUM_THREADS": "1"})
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def on_the_command_line(recipe: dict[str, Any], folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Output of each command on a recipe, by its name."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["data"] |= {"name": str(data), "eval": {"name": str(data), "limit": 3}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    printed = {name: grpo(name, path) for name in ("check", "train")}
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl")] == [1, 2]
    printed["sample"] = grpo("sample", path)
    printed["eval"] = grpo("eval", path, "--model", folder / "run" / "final", "--json")
    return printed


def test_sync_and_async_tools_from_the_command_line(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, tmp_path)
    recipe["episode"] = {"tools": [f"{SHAPES}:multiply", f"{SHAPES}:async_add"]}
    recipe["rewards"] = [f"{SHAPES}:calls_reward", f"{SHAPES}:async_reward"]
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    printed = on_the_command_line(recipe, tmp_path, rows)
    assert "Multiplies two integers." in printed["check"]
    assert "tool async_add" in printed["check"]
    assert {"tools/call_frequency", "rewards/async_reward/mean"} <= set(
        read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    )
    assert "reward" in printed["sample"]
    assert json.loads(printed["eval"])


def test_environments_by_row_from_the_command_line(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model, tmp_path)
    recipe["episode"] = {
        "tools": [f"{SHAPES}:multiply"],
        "environment": {name: f"{SHAPES}:{cls.__name__}" for name, cls in SEVERAL.items()},
    }
    recipe["rewards"] = [f"{SHAPES}:counter_reward"]
    printed = on_the_command_line(recipe, tmp_path, ROWS)
    assert "Increment the internal counter." in printed["check"]
    assert "Raise it to 0." in printed["check"]
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    for name in ("counter_reward", "SilentEnv", "JudgedEnv"):
        assert f"rewards/{name}/mean" in row
    assert json.loads(printed["eval"])


def trained(
    model: Path, folder: Path, script: Any, rows: list[dict[str, Any]] | None, **given: Any
) -> tuple[list[Mapping[str, Any]], Scripted]:
    engine = Scripted(chat_tokenizer("qwen2_5"), script)
    result = grpo_cli.train(recipe_of(model, folder), engine=engine, train_data=rows, **given)
    return result.metrics, engine


def test_tools_that_are_called(model: Path, tmp_path: Path) -> None:
    def script(turn: Turn) -> str:
        if turn.number == 0:
            return call("multiply", a=6, b=7) + call("async_add", a=1, b=1)
        return "It is 42." if turn.sample else call("multiply", a=1, b=1) if turn.number == 1 else "1."

    rows = [{"prompt": row["prompt"]} for row in ROWS]
    rewards = [calls_reward, async_reward]
    metrics, engine = trained(model, tmp_path, script, rows, tools=[multiply, async_add], rewards=rewards)
    # Two results, and of every other episode three; two calls and their results, and what is said about them.
    assert [row["rewards/calls_reward/mean"] for row in metrics] == [2.5, 2.5]
    assert [row["rewards/async_reward/mean"] for row in metrics] == [5.0, 5.0]
    assert [row["tools/call_frequency"] for row in metrics] == [2.5, 2.5]
    assert [row["tools/failure_frequency"] for row in metrics] == [0, 0]
    read = engine.tokenizer.decode(engine.asked[-1].token_ids)
    assert "<tool_response>\n42\n</tool_response>\n<tool_response>\n2\n</tool_response>" in read


def test_one_environment_with_a_reward_function_that_sees_it(model: Path, tmp_path: Path) -> None:
    def script(turn: Turn) -> str:
        return call("increment", step=3 + turn.sample) if turn.number < 2 else "Done."

    rows = [{"prompt": row["prompt"], "goal": row["goal"]} for row in ROWS]
    metrics, engine = trained(model, tmp_path, script, rows, environment=CounterEnv, rewards=counter_reward)
    assert [row["rewards/counter_reward/mean"] for row in metrics] == [7.0, 7.0]  # 3 + 3 and 4 + 4
    assert "Task 0.\nRaise it to 0." in engine.tokenizer.decode(engine.asked[0].token_ids)


def test_each_row_has_the_environment_that_it_names_and_its_tools_alone(model: Path, tmp_path: Path) -> None:
    def script(turn: Turn) -> str:
        if turn.number or turn.sample:
            return "Done."
        return call("increment", step=5) if "increment" in read(turn) else call("press", key="a")

    def read(turn: Turn) -> str:
        text: str = chat_tokenizer("qwen2_5").decode(turn.token_ids)
        assert ('"increment"' in text) != ('"press"' in text)
        return text

    metrics, _ = trained(model, tmp_path, script, ROWS, environment=SEVERAL, rewards=[counter_reward])
    for row in metrics:  # one of two completions calls; three rows, each with another environment
        assert row["rewards/counter_reward/mean"] == 2.5
        assert row["rewards/SilentEnv/mean"] == 0.5
        assert row["rewards/JudgedEnv/mean"] == 5.0
        assert row["tools/unknown_name_total"] == 0
        assert row["tools/failure_frequency"] == 0


def test_rows_that_only_name_an_environment(model: Path, tmp_path: Path) -> None:
    rows = [{"environment": row["environment"], "goal": row["goal"]} for row in ROWS]
    metrics, engine = trained(
        model, tmp_path, lambda turn: "Done.", rows, environment=SEVERAL, rewards=[counter_reward]
    )
    assert metrics[0]["rewards/SilentEnv/mean"] == 0
    assert "user\n\nRaise it to 0." in engine.tokenizer.decode(engine.asked[0].token_ids)
