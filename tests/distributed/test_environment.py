"""What the environment says of ranks, nodes and strategy, and what it must not contradict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_cli.distributed.environment import (
    Nodes,
    Placement,
    as_if_not_launched,
    is_launched,
    placement,
    resolve_strategy,
    step_nodes,
)
from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import DistributedConfig

ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"


OFFLOAD = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}


def ranks(world_size: int, rank: int = 0) -> dict[str, str]:
    """The environment of one of several processes on one machine."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip


def zero(stage: object, **more: str) -> dict[str, str]:
    return {**ranks(2), "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), **more}


def fsdp(**more: str) -> dict[str, str]:
    return {**ranks(2), "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **more}


def deepspeed_file(folder: Path, content: Any) -> str:
    path = folder / "deepspeed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# --- ranks ---


def test_a_process_that_nothing_launched_is_alone() -> None:
    assert not is_launched({"RANK": "0"})
    assert placement({}) == Placement(0, 1, 0, 1)


def test_the_ranks_are_those_of_the_launcher() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert is_launched(environment)
    assert placement(environment) == Placement(5, 8, 1, 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": "8"}, "RANK=8"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "6"}, "LOCAL_RANK=6"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
    ],
)
def test_ranks_that_make_no_sense_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        placement({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **change})


def test_a_program_that_a_worker_starts_has_no_rank() -> None:
    launched = {**zero(3), **fsdp(), "MASTER_PORT": "1", "GROUP_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    own = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "SLURM_PROCID": "0", "MY_RANK": "3"}
    assert as_if_not_launched({**launched, **own}) == own


# --- strategy ---


@pytest.mark.parametrize(
    ("config", "environment", "strategy"),
    [
        ({}, {}, "none"),
        ({}, ranks(1), "none"),
        ({}, ranks(2), "ddp"),
        ({"processes": 2}, ranks(2), "ddp"),
        ({"strategy": "none"}, {}, "none"),
        ({"strategy": "fsdp"}, {}, "fsdp"),
        ({"strategy": "zero3"}, ranks(2), "zero3"),
        ({}, zero(1), "zero1"),
        ({}, zero(2), "zero2"),
        ({}, {**ranks(2), "ACCELERATE_USE_DEEPSPEED": "true"}, "zero2"),
        ({"strategy": "zero3"}, zero(3), "zero3"),
        ({}, fsdp(), "fsdp"),
        ({"strategy": "fsdp"}, fsdp(), "fsdp"),
        ({}, {**ranks(2), "ACCELERATE_USE_DEEPSPEED": "false"}, "ddp"),
        (
            {"strategy": "zero3", "cpu_offload": True},
            zero(3, ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu"),
            "zero3",
        ),
        ({}, zero(3, ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="none"), "zero3"),
    ],
)
def test_the_strategy_is_the_recipes_or_the_launchers_or_by_the_number_of_processes(
    config: dict[str, Any], environment: dict[str, str], strategy: str
) -> None:
    assert resolve_strategy(DistributedConfig(**config), environment) == strategy


@pytest.mark.parametrize(
    ("config", "environment", "named"),
    [
        ({"strategy": "zero2"}, zero(3), "zero2, but Accelerate's launcher was told zero3"),
        ({"strategy": "ddp"}, fsdp(), "ddp, but Accelerate's launcher was told fsdp"),
        ({"strategy": "none"}, ranks(2), "none is for one process, but 2 started"),
        ({"processes": 4}, ranks(2), "processes is 4, but 2 started"),
        ({"processes": 4}, {}, "processes is 4, but 1 started"),
        ({}, zero(0), "ACCELERATE_DEEPSPEED_ZERO_STAGE is 0; write 1, 2 or 3"),
        ({}, zero("three"), "ACCELERATE_DEEPSPEED_ZERO_STAGE is three"),
        ({}, fsdp(FSDP_VERSION="1"), "fsdp_version: 2"),
        ({}, zero(3, **OFFLOAD), "cpu_offload: true"),
        ({}, fsdp(FSDP_OFFLOAD_PARAMS="true"), "cpu_offload: true"),
    ],
)
def test_contradictions_name_both_sides(config: dict[str, Any], environment: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        resolve_strategy(DistributedConfig(**config), environment)


@pytest.mark.parametrize("strategy", ["auto", "zero2"])
def test_the_stage_of_a_deepspeed_file_is_the_strategy(tmp_path: Path, strategy: Any) -> None:
    path = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 2}})
    config = DistributedConfig(strategy=strategy, deepspeed_config=path)
    assert resolve_strategy(config, ranks(2)) == "zero2"
    assert resolve_strategy(config, {}) == "zero2"


def test_accelerates_deepspeed_file_must_be_the_recipes_too(tmp_path: Path) -> None:
    """Its other settings would be lost: Accelerate hands on nothing but its name."""
    path = deepspeed_file(tmp_path, {"zero_optimization": {"stage": 1}})
    environment = zero(3, ACCELERATE_DEEPSPEED_CONFIG_FILE=path)
    assert resolve_strategy(DistributedConfig(deepspeed_config=path), environment) == "zero1"
    with pytest.raises(UserError, match=f"set distributed.deepspeed_config: {path}"):
        resolve_strategy(DistributedConfig(), environment)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "is for zero3, but the strategy is zero2"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage in .* is 0"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage in .* is 2"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage in .* is True"),
        ({"zero_optimization": 2}, "zero_optimization.stage in .* is None"),
        ({"bf16": {"enabled": True}}, "zero_optimization.stage in .* is None"),
        ([], "zero_optimization.stage in .* is None"),
        ("{", "is not JSON"),
    ],
)
def test_a_deepspeed_file_that_does_not_fit_is_named(tmp_path: Path, content: Any, named: str) -> None:
    config = DistributedConfig(strategy="zero2", deepspeed_config=deepspeed_file(tmp_path, content))
    with pytest.raises(UserError, match=named):
        resolve_strategy(config, ranks(2))


def test_a_deepspeed_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read: No such file"):
        resolve_strategy(DistributedConfig(deepspeed_config=path), ranks(2))


# --- Slurm ---


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of the second of four nodes, and a scontrol that knows their names."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node[2-5]" ] && printf "node2\\nnode3\\nnode4\\nnode5\\n"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    return {
        "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "3", "SLURM_PROCID": "1", "SLURM_NODEID": "1",
        "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4",
        "SLURM_STEP_NODELIST": "node[2-5]",
    }  # fmt: skip


def test_a_step_over_several_nodes_meets_on_the_first(step: dict[str, str]) -> None:
    nodes = step_nodes(step)
    assert nodes == Nodes(4, 1, "node2", 20000 + 123403 % 20000)


def test_two_steps_of_one_job_meet_on_two_ports(step: dict[str, str]) -> None:
    first, second = step_nodes(step), step_nodes({**step, "SLURM_STEP_ID": "4"})
    assert first is not None
    assert second is not None
    assert first.port != second.port


def test_address_and_port_of_the_environment_are_taken(step: dict[str, str]) -> None:
    nodes = step_nodes({**step, "MASTER_ADDR": "head", "MASTER_PORT": "29500"})
    assert nodes == Nodes(4, 1, "head", 29500)


def test_a_step_on_one_node_is_like_a_machine(step: dict[str, str]) -> None:
    assert step_nodes({**step, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}) == Nodes()


@pytest.mark.parametrize("step_id", [None, "4294967290", "4294967291"])
def test_the_shell_of_a_job_is_not_a_step(step: dict[str, str], step_id: str | None) -> None:
    step.pop("SLURM_STEP_ID")
    assert step_nodes(step if step_id is None else {**step, "SLURM_STEP_ID": step_id}) is None


def test_several_tasks_on_a_node_are_an_error(step: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"32 tasks on 4 nodes; write --ntasks-per-node=1"):
        step_nodes({**step, "SLURM_STEP_NUM_TASKS": "32"})


def test_a_step_whose_first_node_cannot_be_told_asks_for_its_name(step: dict[str, str]) -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        step_nodes({**step, "SLURM_STEP_NODELIST": "elsewhere"})


# --- the files for accelerate launch ---

SAY = """
import os
from grpo_cli.distributed.environment import placement, resolve_strategy
from grpo_cli.recipe.schema import DistributedConfig
strategy = resolve_strategy(DistributedConfig(), os.environ)
open(f"said-{os.environ['RANK']}", "w").write(f"{strategy} {placement(os.environ).world_size}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_accelerate_launch_with_a_file_of_ours_means_its_strategy(tmp_path: Path, name: str) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    script = tmp_path / "say.py"
    script.write_text(SAY)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / f"{name}.yaml"),
        "--num_processes", "2", "--main_process_port", "0", str(script),
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"said-{rank}").read_text() for rank in range(2)] == [f"{name} 2"] * 2


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_file_as_it_is_meant(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type == kind
    assert config.num_processes == 8
    if kind == "DEEPSPEED":
        assert path.stem == f"zero{config.deepspeed_config['zero_stage']}"
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
