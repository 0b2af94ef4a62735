"""`slurm/5node.sh` itself, with CPU overrides: four nodes that train, and a real vLLM server on the fifth."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_cli.record.metrics import read_metrics
from tests.slurm.cluster import Cluster, Job

pytest.importorskip("vllm")
pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

TIMEOUT_S = 420
"""A server takes up to a minute and a half to start on two busy cores, four trainers one; twice if requeued."""

REWARDS = '''
import time

def patient(completions, **kwargs):
    """Long enough that a step can be interrupted."""
    time.sleep(1.5)
    return [float(len(set(text))) for text in completions]

def fails(completions, **kwargs):
    raise ValueError("the judge is on strike")
'''

Submit = Callable[..., Job]


@pytest.fixture
def submit(cluster: Cluster, vllm_model_dir: Path, tmp_path: Path) -> Submit:
    """Submits slurm/5node.sh for a tiny model with some reward and number of steps."""
    (tmp_path / "slurm_rewards.py").write_text(REWARDS)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "question {i}:", "answer": "{i}"}}\n' for i in range(10)))
    cpu = {
        "TP": "1",
        "MODEL": str(vllm_model_dir),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def submit_recipe(reward: str, steps: int) -> Job:
        recipe: dict[str, Any] = {
            "model": {"name": str(vllm_model_dir)},
            "data": {"name": str(prompts)},
            "rewards": [reward],
            "generation": {"num_generations": 4, "max_completion_tokens": 8},
            "optim": {"learning_rate": 1e-3},
            "train": {"output_dir": "replaced", "max_steps": steps, "prompts_per_step": 4},
            "logging": {"trackers": []},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return cluster.submit("5node.sh", tmp_path, "--time=30", RECIPE="recipe.yaml", **cpu)

    return submit_recipe


def assert_trained(job: Job, steps: int) -> None:
    """Four ranks trained together, each step once, with completions of exactly their weights, to a final model."""
    from transformers import AutoModelForCausalLM

    rows = read_metrics(job.run_folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4
    assert all(row["grad_norm"] > 0 for row in rows)
    shards = job.run_folder / f"checkpoint-{steps:06d}"
    assert sorted(path.name for path in shards.glob("optimizer*")) == [
        f"optimizer-{rank:05d}-of-00004.pt" for rank in range(4)
    ]
    AutoModelForCausalLM.from_pretrained(job.run_folder / "final")


def test_training_that_fails_ends_the_job_and_its_server(submit: Submit) -> None:
    job = submit("slurm_rewards:fails", 3)
    state = job.wait(TIMEOUT_S)  # which also sees that no process of the server is left
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", 1, 0), job.log()
    assert "the judge is on strike" in job.log("train-*.log")
    assert "ready: " in job.log("serve-*.log"), "there was a server to end"


def test_four_nodes_train_with_zero3_against_the_fifth_through_a_time_limit_to_the_end(submit: Submit) -> None:
    """The limit brings a checkpoint, and the job that is requeued goes on from there."""
    job = submit("slurm_rewards:patient", 6)
    metrics = job.run_folder / "metrics.jsonl"
    job.wait_until(lambda: metrics.exists() and len(read_metrics(metrics)) >= 2, TIMEOUT_S)
    job.ask_to_stop()
    job.wait_until(lambda: job.state().restarts == 1, 60)
    (checkpoint,) = job.run_folder.glob("checkpoint-*")
    stopped_after = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 2 <= stopped_after < 6
    state = job.wait(TIMEOUT_S)
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", 0, 1), job.log()
    assert f"resuming from runs/{job.name}/{checkpoint.name}" in job.log("train-node1.log")
    assert_trained(job, steps=6)
    for rank in range(4):
        assert f"node {rank} of 4: 1 processes" in (job.logs / f"train-node{rank + 1}.log").read_text()
    assert "ready: http://0.0.0.0:8000" in (job.logs / "serve-node5.log").read_text()
    key_file = job.run_folder / "server-key"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert key_file.read_text().strip() not in job.log()
