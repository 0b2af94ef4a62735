"""What only GPUs can show: sleeping in the training process, NCCL, tensor parallelism."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo_cli.record.metrics import read_metrics
from tests.rollout.driving import Driven

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.gpu]
ROOT = Path(__file__).parents[2]


def needs_gpus(count: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} CUDA devices")


def train(recipe: dict[str, Any], folder: Path, model: Path) -> list[dict[str, Any]]:
    """Run the CLI on the tiny model for three steps; the rows of its metrics."""
    recipe["model"] = {"name": str(model)}
    recipe["train"]["output_dir"] = str(folder / "run")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "grpo_cli.cli", "train", str(path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(folder / "run" / "metrics.jsonl")


def check(rows: list[dict[str, Any]]) -> None:
    """Weights moved in every step, and vLLM had the same ones as the policy (bfloat16 against autocast)."""
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows[1:]:
        assert row["sync/bytes"] > 0
        assert row["sampling/sampling_logp_difference/mean"] < 0.05


@needs_gpus(1)
def test_vllm_in_the_training_process_gives_its_memory_back(
    tiny_recipe: dict[str, Any], vllm_model_dir: Path, tmp_path: Path
) -> None:
    tiny_recipe["generation"] |= {"engine": "vllm"}
    check(train(tiny_recipe, tmp_path, vllm_model_dir))


@needs_gpus(1)
def test_sleeping_frees_the_memory_that_generation_took(vllm_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from grpo_cli.recipe.schema import GenerationConfig
    from grpo_cli.rollout.policy_weights import PolicyWeights
    from grpo_cli.rollout.vllm.engine import VllmEngine

    model = AutoModelForCausalLM.from_pretrained(vllm_model_dir, dtype=torch.float32).cuda()
    tokenizer = AutoTokenizer.from_pretrained(vllm_model_dir)
    config = GenerationConfig(max_completion_tokens=8)
    engine = VllmEngine(model, PolicyWeights(model), tokenizer, config, {256})
    asleep, total = torch.cuda.mem_get_info()
    engine.update_weights(0)
    awake, _ = torch.cuda.mem_get_info()
    assert asleep - awake > 0.1 * total
    (first,) = Driven(engine).generate([[5, 6, 7]], [(0,)], 2)
    engine.release_memory()
    assert torch.cuda.mem_get_info()[0] > asleep - 0.05 * total
    engine.update_weights(1)  # level 2 discards the weights: they must have come back
    (second,) = Driven(engine).generate([[5, 6, 7]], [(0,)], 2)
    assert [one.token_ids for one in first] == [one.token_ids for one in second]
    engine.close()


@needs_gpus(2)
def test_weights_reach_a_server_on_another_gpu_by_nccl(
    tiny_recipe: dict[str, Any], vllm_model_dir: Path, tmp_path: Path
) -> None:
    tiny_recipe["generation"] |= {"engine": "vllm_server", "server": {"spawn": True}}
    check(train(tiny_recipe, tmp_path, vllm_model_dir))


@needs_gpus(3)
def test_weights_reach_all_workers_of_a_tensor_parallel_server(
    tiny_recipe: dict[str, Any], vllm_model_dir: Path, tmp_path: Path
) -> None:
    tiny_recipe["generation"] |= {"engine": "vllm_server", "server": {"spawn": True, "tensor_parallel_size": 2}}
    check(train(tiny_recipe, tmp_path, vllm_model_dir))
