"""The real command line, as a process: train, kill, resume, stop, evaluate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo_cli.record.metrics import read_metrics
from tests.processes import ROOT, Command

pytestmark = pytest.mark.slow
TIMES = ("time/", "tokens_per_second")
EXPECTED_METRICS = {
    "step", "epoch", "num_tokens", "loss", "grad_norm", "learning_rate", "entropy", "kl",
    "reward", "reward_std", "frac_reward_zero_std", "rewards/reward_len/mean", "rewards/reward_len/std",
    "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio", "completions/mean_terminated_length",
    "completions/min_terminated_length", "completions/max_terminated_length",
    "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
    "clip_ratio/region_mean", "time/generate", "time/reward", "time/train", "time/step", "tokens_per_second",
}  # fmt: skip


def start(*arguments: str | Path) -> Command:
    return Command(*arguments, environment=os.environ | {"OMP_NUM_THREADS": "1"})


def grpo_from_its_interpreter(*arguments: str | Path) -> str:
    """As a shell starts it, with every import; `grpo` is the same from a process that has those behind it."""
    command = [sys.executable, "-m", "grpo_cli.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def grpo(*arguments: str | Path, code: int = 0) -> str:
    process = start(*arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def numbers(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder / "final").state_dict())


def assert_same_weights(one: Path, other: Path) -> None:
    theirs = final_weights(other)
    for name, value in final_weights(one).items():
        assert torch.equal(value, theirs[name]), name


def wait_for_step(folder: Path, step: int, process: Command) -> None:
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and len(read_metrics(metrics)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came: {process.communicate()[0]}")


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    """12 steps with several optimizer steps each, a reference, and a checkpoint every fifth step."""
    tiny_recipe["train"] |= {
        "max_steps": 12, "save_every": 5, "num_iterations": 2, "optimizer_steps_per_rollout": 2,
    }  # fmt: skip
    tiny_recipe["loss"] = {"beta": 0.05}
    tiny_recipe["data"]["eval"] = {"name": tiny_recipe["data"]["name"], "limit": 4}
    tiny_recipe["model"]["lora"] = None
    tiny_recipe["logging"] = {"trackers": ["tensorboard"], "print_completions": 6}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


def test_train_kill_resume_and_eval(recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = grpo_from_its_interpreter("train", recipe, "--set", f"train.output_dir={whole}")
    assert "step 12/12" in output
    assert "before training" in output
    assert "after training" in output
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert set(rows[0]) >= EXPECTED_METRICS
    assert {"eval_reward", "eval_pass@1", "eval_pass@4"} <= set(rows[-1])
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-000010", "checkpoint-000012"]
    assert list((whole / "tensorboard").iterdir())
    assert len(list((whole / "completions").glob("*.parquet"))) == 12

    process = start("train", recipe, "--set", f"train.output_dir={killed}")
    wait_for_step(killed, 7, process)
    process.kill()  # after the checkpoint of step 5, somewhere inside step 8 or its neighbours
    process.communicate()
    assert not (killed / "final").exists()
    output = grpo("train", recipe, "--set", f"train.output_dir={killed}", "--resume")
    assert "resuming from" in output
    assert numbers(killed) == numbers(whole)
    assert_same_weights(killed, whole)

    evaluated = json.loads(grpo("eval", recipe, "--model", whole / "final", "--json"))
    assert evaluated["eval_reward"] == pytest.approx(rows[-1]["eval_reward"], abs=1e-9)
    at_ten = json.loads(grpo("eval", recipe, "--model", whole / "checkpoint-000010", "--json"))
    assert at_ten["eval_completions/mean_length"] > 0

    again = grpo("train", whole / "recipe.yaml", "--set", f"train.output_dir={tmp_path / 'again'}")
    assert "step 12/12" in again
    assert_same_weights(tmp_path / "again", whole)


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_exits_75(
    recipe: Path, tmp_path: Path, stop_signal: signal.Signals
) -> None:
    folder = tmp_path / "stopped"
    settings = (
        "--set",
        f"train.output_dir={folder}",
        "--set",
        "train.save_every=0",
        "--set",
        "train.max_steps=500",
    )
    process = start("train", recipe, *settings)
    wait_for_step(folder, 3, process)
    process.send_signal(stop_signal)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert "--resume" in output
    steps = len(read_metrics(folder / "metrics.jsonl"))
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{steps:06d}"]
    assert not (folder / "final").exists()


def test_lora_run_killed_and_resumed_is_exact(recipe: Path, tmp_path: Path) -> None:
    settings = ("--set", "model.lora={r: 4, dropout: 0.2}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    grpo("train", recipe, *settings, "--set", f"train.output_dir={whole}")
    process = start("train", recipe, *settings, "--set", f"train.output_dir={killed}")
    wait_for_step(killed, 6, process)
    process.kill()
    process.communicate()
    grpo("train", recipe, *settings, "--set", f"train.output_dir={killed}", "--resume")
    assert numbers(killed) == numbers(whole)
    assert_same_weights(killed, whole)
    evaluated = json.loads(grpo("eval", recipe, *settings, "--model", whole / "checkpoint-000010", "--json"))
    assert evaluated["eval_reward"] < 0


def test_resume_before_the_first_checkpoint_starts_over_to_the_same_end(recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    grpo("train", recipe, "--set", f"train.output_dir={whole}")
    process = start("train", recipe, "--set", f"train.output_dir={killed}")
    wait_for_step(killed, 2, process)
    process.kill()
    process.communicate()
    grpo("train", recipe, "--set", f"train.output_dir={killed}", "--resume")
    assert numbers(killed) == numbers(whole)
    assert_same_weights(killed, whole)


def test_sample_shows_completions_and_rewards(recipe: Path) -> None:
    output = grpo("sample", recipe, "-n", "2")
    assert output.count("reward_len") == 2
