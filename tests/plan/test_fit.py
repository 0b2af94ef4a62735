from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.errors import UserError
from grpo_cli.plan import fit
from grpo_cli.plan.fit import Gpu, check_fit, memory_rows
from grpo_cli.plan.memory import GIB
from grpo_cli.plan.setup import setup_of
from grpo_cli.plan.shape import ModelSize, shape_of
from grpo_cli.recipe.load import load_recipe
from tests.plan.models import RECIPE_72B, ROOT, SIZE_72B, SMALL, setup_72b


@pytest.mark.parametrize(
    ("overrides", "gib", "advice"),
    [
        (["model.gradient_checkpointing=false"], 80, {"model.gradient_checkpointing": "true"}),
        ([], 64, {"train.max_tokens_per_microbatch": "4096"}),
        (["distributed.strategy=zero2"], 80, {"distributed.strategy": "zero3"}),
        (["distributed.processes=8"], 80, {"distributed.processes": "32"}),
        (["generation={}"], 80, {"generation.engine": "vllm_server"}),
        (["distributed.processes=504", "distributed.strategy=fsdp"], 14, {"model.lora": "{}"}),
    ],
)
def test_the_change_that_is_proposed_is_enough(overrides: list[str], gib: float, advice: dict[str, str]) -> None:
    recipe = load_recipe(RECIPE_72B, overrides)
    gpu = Gpu(gib, "test", True)
    changes, plan = next(fit.fits(setup_of(recipe), SIZE_72B, gpu))
    assert advice.items() <= changes.items()
    with pytest.raises(UserError) as caught:
        check_fit(setup_of(recipe), SIZE_72B, gpu)
    assert f"it takes {plan.peak / GIB:.1f} GiB" in str(caught.value)
    followed = [f"{key}={value}" for key, value in changes.items()]
    if "generation.engine" in changes:
        followed.append("generation.server={urls: [node5]}")
    if "distributed.cpu_offload" in changes:
        assert changes["distributed.cpu_offload"] == "true"
    again = setup_of(load_recipe(RECIPE_72B, [*overrides, *followed]))
    assert check_fit(again, SIZE_72B, gpu) is None


def test_what_nothing_helps_is_said() -> None:
    with pytest.raises(UserError, match="no setting makes it fit; take a smaller model"):
        check_fit(setup_72b(), SIZE_72B, Gpu(1, "test", True))


def test_an_assumed_gpu_is_no_reason_to_refuse() -> None:
    warning = check_fit(setup_72b(strategy="ddp"), SIZE_72B, Gpu(80, "assumed", False))
    assert warning is not None
    assert warning.startswith("on GPUs of 80 GiB it would not fit: it needs ")
    assert "with distributed.strategy zero3 it takes 67.3 GiB" in warning


def test_without_a_shape_the_plan_says_what_it_leaves_out() -> None:
    rows = dict(memory_rows(setup_72b(), ModelSize(GIB, None, "the safetensors files"), Gpu(80, "test", True)))
    assert "without activations" in rows["memory"]
    assert "in training" not in "".join(rows)


@pytest.mark.parametrize("strategy", ["none", "ddp", "zero2", "zero3", "fsdp"])
def test_loading_needs_the_model_once_on_a_node_however_many_share_it(strategy: Any) -> None:
    setup = setup_72b(strategy=strategy, processes=1 if strategy == "none" else 32)
    row = dict(memory_rows(setup, SIZE_72B, Gpu(80, "test", True)))["loading"]
    assert row == "135.4 GiB of the first node's 1024 GiB of CPU memory (assumed)"


def test_what_is_offloaded_is_beside_the_model_and_may_be_more_than_a_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "_host_memory", lambda: 500.0)
    setup, gpu = setup_72b(cpu_offload=True), Gpu(80, "test", True, is_here=True)
    row = dict(memory_rows(setup, SIZE_72B, gpu))["loading"]
    assert row.startswith(
        "507.8 GiB of the first node's 500 GiB of CPU memory (this machine's): more than there is"
    )
    assert "more" not in dict(memory_rows(replace(setup, cpu_offload=False), SIZE_72B, gpu))["loading"]


def test_the_smallest_gpu_of_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 24576\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert (fit.gpu_of(None).gib, fit.gpu_of(None).is_known) == (24, True)
    assert fit.gpu_of(40).gib == 40
    program.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    assert not fit.gpu_of(None).is_known


def grpo_check(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "300", "PATH": "/nowhere"}
    command = [sys.executable, "-m", "grpo_cli.cli", "check", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_check_prints_the_plan_of_the_72b_recipe_without_a_network() -> None:
    done = grpo_check("recipes/unique_chars_72b.yaml")
    assert done.returncode == 0, done.stderr
    assert "72,706,203,648, by the shape as published" in done.stdout
    assert "67.3 GiB on each of 32 GPUs (zero3) of 80 GiB (assumed" in done.stdout
    assert "25.4 GiB: float32 master and two moments: 12 bytes each, divided by 32" in done.stdout
    assert "145.4 GB of bfloat16 weights" in done.stdout
    assert "5.8 s at 25 GB/s" in done.stdout
    assert "would not fit" not in done.stdout
    assert done.stderr == ""


def test_check_refuses_a_plan_that_cannot_fit_the_given_gpu() -> None:
    done = grpo_check("recipes/unique_chars_72b.yaml", "--gpu-memory", "80", "--set", "distributed.strategy=zero2")
    assert done.returncode == 2
    assert "weights 135.4 GiB" in done.stderr
    assert "with distributed.strategy zero3 it takes 67.3 GiB" in done.stderr
    assert "the recipe is fine" not in done.stdout


def test_check_warns_without_refusing_where_no_gpu_is_known() -> None:
    done = grpo_check("recipes/unique_chars_72b.yaml", "--set", "distributed.strategy=zero2")
    assert done.returncode == 0
    assert "on GPUs of 80 GiB it would not fit" in done.stdout


def test_a_folder_with_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    config = SMALL | {"model_type": "qwen2", "hidden_size": 4096, "num_hidden_layers": 40}
    (tmp_path / "big" / "config.json").write_text(json.dumps(config))
    done = grpo_check("recipes/unique_chars_72b.yaml", "--set", f"model.name={tmp_path / 'big'}")
    assert done.returncode == 0, done.stderr
    found = shape_of(config)
    assert found is not None
    assert f"{found.parameters:,}, by config.json" in done.stdout


def test_a_model_that_nothing_is_known_of_is_no_error() -> None:
    done = grpo_check("recipes/unique_chars_72b.yaml", "--set", "model.name=nobody/nothing", "--gpu-memory", "8")
    assert done.returncode == 0, done.stderr
    assert "known once the model is loaded: its config.json is not on this machine" in done.stdout
