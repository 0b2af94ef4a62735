"""What the environment says of the processes that train together: their ranks, their nodes, their strategy.

Never imports torch: the launcher reads this before anything heavy, each worker again after it was started.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_cli.errors import UserError
from grpo_cli.recipe.strategies import STRATEGIES, StrategyName

if TYPE_CHECKING:
    from grpo_cli.recipe.schema import DistributedConfig  # `grpo --help` comes here and needs no pydantic

LAUNCHER_PID = "GRPO_LAUNCHER"
"""Environment variable that our own launcher sets for its workers: its process id."""

FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""Slurm's batch and interactive shells are steps with numbers from here; nothing started several of them."""

SCONTROL_TIMEOUT_S = 30

LAUNCHERS_VARIABLES = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|(TORCHELASTIC|ACCELERATE|FSDP)_.*|GRPO_LAUNCHER)"
)


@dataclass(frozen=True)
class Placement:
    """Where this process stands among those that train together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True)
class Nodes:
    """The machines that train together, each with a launcher of its own."""

    count: int = 1
    index: int = 0  # of this machine
    address: str = "127.0.0.1"  # of machine 0
    port: int = 0  # on machine 0; 0 is any free one, which is for a single machine


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def placement(environment: Mapping[str, str]) -> Placement:
    """This process's ranks, as torchrun and all that build on it set them; those of a single process if none did.

    Raises:
        UserError: the variables are incomplete or contradict each other.
    """
    if not is_launched(environment):
        return Placement(0, 1, 0, 1)
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    local_rank, local_size = _number(environment, "LOCAL_RANK"), _number(environment, "LOCAL_WORLD_SIZE")
    if not (rank < world_size and local_rank < local_size <= world_size and local_rank <= rank):
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size} "
            "contradict each other; unset them, or start the processes with grpo train, accelerate or torchrun"
        )
    return Placement(rank, world_size, local_rank, local_size)


def as_if_not_launched(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for another program that a worker starts: it must not take the worker's rank for its own."""
    return {name: value for name, value in environment.items() if not LAUNCHERS_VARIABLES.fullmatch(name)}


def resolve_strategy(config: DistributedConfig, environment: Mapping[str, str]) -> StrategyName:
    """The recipe's strategy, or what Accelerate's launcher was told, or the one for the number of processes.

    Raises:
        UserError: recipe, launcher and DeepSpeed file contradict each other, or the file cannot be used.
    """
    world_size = placement(environment).world_size
    if config.processes is not None and config.processes != world_size:
        raise UserError(
            f"distributed.processes is {config.processes}, but {world_size} started; leave it empty, "
            f"or start {config.processes} with grpo train, accelerate or torchrun"
        )
    said = _accelerate_strategy(environment)
    if said is not None and config.strategy not in ("auto", said):
        raise UserError(
            f"distributed.strategy is {config.strategy}, but Accelerate's launcher was told {said}; "
            "write auto, or the same in both"
        )
    strategy = said if config.strategy == "auto" else config.strategy
    if config.deepspeed_config is not None:
        of_file = _of_file(config.deepspeed_config)
        if strategy not in (None, of_file):
            raise UserError(
                f"distributed.deepspeed_config: {config.deepspeed_config} is for {of_file}, but the strategy is "
                f"{strategy}; change one of them"
            )
        strategy = of_file
    elif (file := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none" and said is not None:
        raise UserError(
            f"Accelerate's launcher was given the DeepSpeed file {file}; set distributed.deepspeed_config: {file} "
            "in the recipe, or take it out of Accelerate's configuration"
        )
    elif said is not None and not config.cpu_offload and _offload_is_asked(environment):
        raise UserError(
            "Accelerate's launcher was told to offload to the CPU; set distributed.cpu_offload: true and "
            f"distributed.strategy: {said} in the recipe"
        )
    if strategy is None:
        strategy = "ddp" if world_size > 1 else "none"
    if STRATEGIES[strategy].for_one_process and world_size > 1:
        raise UserError(
            f"distributed.strategy {strategy} is for one process, but {world_size} started; write auto"
        )
    return strategy


def planned_strategy(
    config: DistributedConfig, processes: int, environment: Mapping[str, str] | None = None
) -> StrategyName:
    """What `resolve_strategy` will say in each of so many processes that are started in this environment.

    Raises:
        UserError: as `resolve_strategy`.
    """
    ranks = {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": processes}
    return resolve_strategy(config, {**(environment or {}), **{name: str(value) for name, value in ranks.items()}})


def step_nodes(environment: Mapping[str, str]) -> Nodes | None:
    """The nodes of the srun step that this process belongs to, or None outside one.

    Raises:
        UserError: the step has several tasks on a node, or its first node cannot be told.
    """
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return None  # the batch shell of a job has no step: it is one machine
    step = _number(environment, "SLURM_STEP_ID")
    if step >= FIRST_SPECIAL_STEP:
        return None
    count = _number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if tasks > count:
        raise UserError(
            f"srun started {tasks} tasks on {count} node{'s' if count > 1 else ''}; write --ntasks-per-node=1, "
            "grpo starts the processes of a node itself"
        )
    if count <= 1:
        return Nodes()
    # The first host is that of node 0, also where the tasks were spread in another order.
    index = _number(environment, "SLURM_NODEID", "SLURM_PROCID")
    address = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT")
    else:
        port = 20000 + (_number(environment, "SLURM_JOB_ID") * 100 + step) % 20000
    return Nodes(count, index, address, port)


def _first_host(nodelist: str) -> str:
    try:
        result = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist],
            capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S, check=True,
        )  # fmt: skip
        return result.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(
            f"scontrol show hostnames {nodelist!r} does not tell the first node ({error}); "
            "set MASTER_ADDR to its name"
        ) from error


def _accelerate_strategy(environment: Mapping[str, str]) -> StrategyName | None:
    """What `accelerate launch` was told to use, or None where it only starts processes."""
    if _is_true(environment, "ACCELERATE_USE_FSDP"):
        if environment.get("FSDP_VERSION") != "2":
            raise UserError("FSDP version 1 is not supported; set fsdp_version: 2 in Accelerate's configuration")
        return "fsdp"
    if not _is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return None
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return _of_file(file)
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # Accelerate's own default
    return _of_stage(int(stage) if stage.isdecimal() else stage, "ACCELERATE_DEEPSPEED_ZERO_STAGE")


def _of_file(path: str) -> StrategyName:
    """The strategy that a DeepSpeed JSON file is for."""
    try:
        settings = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the DeepSpeed file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the DeepSpeed file {path} is not JSON: {error}") from error
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    return _of_stage(zero.get("stage") if isinstance(zero, dict) else None, f"zero_optimization.stage in {path}")


def _of_stage(stage: object, source: str) -> StrategyName:
    for name, traits in STRATEGIES.items():
        if type(stage) is int and traits.zero_stage == stage:  # JSON's true equals 1
            return name
    raise UserError(f"{source} is {stage}; write 1, 2 or 3 (ddp is for weights and states that are not shared)")


def _offload_is_asked(environment: Mapping[str, str]) -> bool:
    devices = [environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") for what in ("OPTIMIZER", "PARAM")]
    return any(device not in (None, "none") for device in devices) or _is_true(environment, "FSDP_OFFLOAD_PARAMS")


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes", "on")


def _number(environment: Mapping[str, str], *names: str) -> int:
    """The value of the first of `names` that is set."""
    name = next((name for name in names if name in environment), names[0])
    text = environment.get(name, "")
    if not text.isdecimal():
        shown = f"is {text!r}" if text else "is not set"
        raise UserError(f"{name} {shown}, where a launcher sets a whole number")
    return int(text)
