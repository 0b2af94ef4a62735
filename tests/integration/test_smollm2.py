"""The shipped recipes with a real language model: SmolLM2-135M-Instruct from a GGUF file (`make model`)."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_cli.record.metrics import read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def needs_the_model() -> None:
    if not MODEL.is_dir():
        pytest.skip("`make model` brings SmolLM2-135M-Instruct")


def grpo(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "grpo_cli.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart_raises_the_mean_reward_clearly(tmp_path: Path) -> None:
    output = grpo(
        "train", "recipes/quickstart.yaml", "--set", f"train.output_dir={tmp_path}", "--set", "train.max_steps=8"
    )
    rewards = [row["reward"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    first, last = rewards[:3], rewards[-3:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / 3)
    assert statistics.mean(last) - statistics.mean(first) > 2 * error, rewards
    assert "before training" in output
    assert "after training" in output
    assert str(tmp_path / "final") in output

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        reply = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert reply.shape[1] > inputs["input_ids"].shape[1]


def test_gsm8k_recipe_runs_on_local_rows_and_logs_every_metric(tmp_path: Path) -> None:
    output = grpo(
        "train", "recipes/gsm8k.yaml",
        "--set", f"model.name={MODEL}",
        "--set", "data.name=tests/golden/gsm8k/train.jsonl",
        "--set", "rewards.1={path: rewards.length:reward_len, weight: 0.01}",
        "--set", "optim.learning_rate=1e-5",
        "--set", "generation.max_completion_tokens=32",
        "--set", "generation.num_generations=2",
        "--set", "train.prompts_per_step=2",
        "--set", "train.max_steps=3",
        "--set", f"train.output_dir={tmp_path}",
    )  # fmt: skip
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 3
    for name in ("reward", "rewards/boxed_answer/mean", "kl", "entropy", "loss", "grad_norm", "num_tokens"):
        assert all(row[name] is not None for row in rows), name
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4), "before its first update the policy is the reference"
    assert rows[-1]["kl"] > 0
    assert "data.config (main) is not used: tests/golden/gsm8k/train.jsonl is a file" in output
