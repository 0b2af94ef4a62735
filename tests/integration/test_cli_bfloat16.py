"""The real command line with bfloat16 autocast, as a GPU runs it by default: precision bugs show without one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo_cli.algorithm.packing import Group, pack_groups
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.recipe.load import load_recipe
from grpo_cli.record.metrics import read_metrics
from grpo_cli.train.assemble import assemble
from grpo_cli.train.objects import Objects
from tests.integration.test_cli_train import assert_same_weights, grpo, numbers, start, wait_for_step

pytestmark = pytest.mark.slow

NOISE = 0.25
"""Nats between two ways to compute a log-probability of these tiny models in bfloat16; 0.05 on average."""

ADAPTED = {
    "full": {},
    "lora": {"lora": {"r": 4, "target_modules": "all-linear"}},
}


@pytest.fixture(params=ADAPTED)
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """12 steps with a KL, two optimizer steps each, and a checkpoint every fifth step."""
    tiny_recipe["model"] |= {"compute_dtype": "bfloat16"} | ADAPTED[request.param]
    tiny_recipe["train"] |= {"max_steps": 12, "save_every": 5, "optimizer_steps_per_rollout": 2}
    tiny_recipe["loss"] = {"beta": 0.05}
    tiny_recipe["data"]["eval"] = {"name": tiny_recipe["data"]["name"], "limit": 4}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


def assert_finite(values: dict[str, Any]) -> None:
    for name, value in values.items():
        assert value is None or not isinstance(value, float) or math.isfinite(value), name


def test_train_kill_resume_eval_and_sample(recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = grpo("train", recipe, "--set", f"train.output_dir={whole}")
    assert "step 12/12" in output
    assert "cannot be shared" not in output
    for row in read_metrics(whole / "metrics.jsonl"):
        assert_finite(row)
    rows = numbers(whole)
    assert any(row["kl"] > 0 for row in rows[1:]), "the policy has moved"

    process = start("train", recipe, "--set", f"train.output_dir={killed}")
    wait_for_step(killed, 6, process)
    process.kill()
    process.communicate()
    grpo("train", recipe, "--set", f"train.output_dir={killed}", "--resume")
    assert numbers(killed) == rows
    assert_same_weights(killed, whole)

    evaluated = json.loads(grpo("eval", recipe, "--model", whole / "checkpoint-000012", "--json"))
    assert_finite(evaluated)
    assert evaluated["eval_reward"] == pytest.approx(rows[-1]["eval_reward"], abs=1e-9)
    output = grpo("sample", recipe, "-n", "2")
    assert output.count("reward_len") == 2
    assert "cannot be shared" not in output
    assert "nan" not in output.lower()


def test_log_probabilities_of_sampling_are_the_policys_but_for_noise(recipe: Path) -> None:
    rollouts, learner = assemble(load_recipe(recipe), Objects(), Ranks())
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert learner.policy.shares_prompts
    prompts = [rollouts.dataset[index] for index in range(6)]
    groups = rollouts.engine.generate(prompts, [(1, index) for index in range(6)], 4)
    packed = [
        Group(prompt.token_ids, [completion.token_ids for completion in group], range(4 * index, 4 * index + 4))
        for index, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
    ]
    for shared_prompt in (True, False):
        (pack,) = pack_groups(packed, 10_000, shared_prompt=shared_prompt)
        with torch.no_grad(), learner.autocast():
            logprobs, _ = learner.policy.token_logprobs(pack, learner.recipe.generation.temperature)
        differences = []
        for row, sample in enumerate(pack.samples.tolist()):
            sampled = torch.tensor(groups[sample // 4][sample % 4].logprobs)
            differences.append((logprobs[row, : len(sampled)] - sampled).abs())
        difference = torch.cat(differences)
        assert difference.max() < NOISE
        assert difference.mean() < NOISE / 5
