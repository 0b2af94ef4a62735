"""Starts the processes that train together, on one machine or on each node of a Slurm step.

Accelerate's launcher runs torch's elastic agent in this process. It is told to start plain processes: how they
share the training is up to the recipe. torch is not imported before it is known that there is something to start.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from grpo_cli.distributed.environment import LAUNCHER_PID, Nodes, is_launched, planned_strategy, step_nodes
from grpo_cli.errors import RunError, UserError
from grpo_cli.launch.failures import STOP_SIGNALS, raise_outcome
from grpo_cli.recipe.schema import Recipe
from grpo_cli.serve.own_folder import OwnFolder


def launch_if_needed(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Return if this process is to train itself. Otherwise run the processes that do, and end as they end.

    Args:
        recipe: validated, with all overrides.
        arguments: the words of the command line after `grpo`; the workers get the same.

    Raises:
        UserError: this machine, the Slurm step or the launcher contradicts the recipe.
        RunError, StoppedEarly: the workers' outcome.
        SystemExit: 0 when the workers are done.
    """
    if is_launched(os.environ):
        return
    step = step_nodes(os.environ)
    nodes = step or Nodes()
    processes = recipe.distributed.processes
    if processes is None and step is not None and recipe.generation.engine != "vllm":
        processes = max(training_gpus(recipe, nodes), 1) * nodes.count
    processes = processes or 1
    if processes % nodes.count:
        raise UserError(f"distributed.processes is {processes}, which does not divide among {nodes.count} nodes")
    if processes == 1:
        return
    local = processes // nodes.count
    gpus = training_gpus(recipe, nodes)
    if 0 < gpus < local:
        raise UserError(
            f"{local} processes on this machine are more than its {gpus} GPUs for training; "
            f"write --processes {gpus * nodes.count}"
        )
    planned_strategy(recipe.distributed, processes, os.environ)  # an error here is told once, not by each process
    run_workers("grpo_cli.cli", arguments, processes, nodes)
    raise SystemExit(0)


def training_gpus(recipe: Recipe, nodes: Nodes) -> int:
    """Number of this machine's GPUs that train.

    A server that the run spawns takes its own from those of machine 0, unless that would leave none.
    """
    import torch

    count = torch.cuda.device_count()
    server = recipe.generation.server
    if server is None or not server.spawn or nodes.index > 0:
        return count
    served = server.tensor_parallel_size * int(recipe.generation.vllm.get("data_parallel_size", 1))
    return count - served if count > served else count


def run_workers(module: str, arguments: Sequence[str], processes: int, nodes: Nodes) -> None:
    """Run `python -m module arguments` in several processes to their end.

    Args:
        module: name of the module.
        arguments: its command line, the same for all.
        processes: number over all nodes; this machine starts its share.
        nodes: the machines; each runs this function.

    Raises:
        UserError, RunError, StoppedEarly, SystemExit: the workers' outcome, as `raise_outcome` tells it.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # What went wrong is told once, by `raise_outcome`.
    agent_log = logging.getLogger("torch.distributed.elastic")
    agent_log.addHandler(logging.NullHandler())
    agent_log.propagate = False

    local = processes // nodes.count
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(available_cores() // local, 1))
    with OwnFolder("grpo-launch-") as folder:
        config, logs = folder / "accelerate.yaml", folder / "workers"
        logs.mkdir()
        config.write_text(yaml.safe_dump(accelerate_config(processes, nodes)))
        options = launch_command_parser().parse_args(
            [
                f"--config_file={config}",
                f"--log_dir={logs}",
                f"--num_cpu_threads_per_process={threads}",
                "--max_restarts=0",
                "--module",
                module,
                *arguments,
            ]
        )
        # An option of torchrun that Accelerate hands on without having it: the other signals are forwarded.
        ends_by = ["SIGQUIT"] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else ["SIGQUIT", "SIGHUP"]
        options.signals_to_handle = ",".join(ends_by)
        if nodes.count > 1:
            print(
                f"node {nodes.index} of {nodes.count}: {local} processes, meeting at {nodes.address}:{nodes.port}",
                file=sys.stderr,
            )
        with forwarded_signals(logs) as received, patch_environment(**{LAUNCHER_PID: str(os.getpid())}):
            try:
                launch_command(options)
            except ChildFailedError as error:
                raise_outcome(error.failures, nodes, received)
            except SignalException as error:
                raise RunError(f"stopped at once by {error.sigval.name}") from None
            except (DistError, ConnectionError) as error:
                raise RunError(f"the nodes did not meet at {nodes.address}:{nodes.port}: {error}") from error


def accelerate_config(processes: int, nodes: Nodes) -> dict[str, Any]:
    """Accelerate's configuration for plain processes. It is complete, so that the user's own file is not read.

    The type is MULTI_GPU on every machine: MULTI_CPU would start one process, without a word.
    """
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "debug": False,
        "gpu_ids": "all",
        "machine_rank": nodes.index,
        "main_process_ip": nodes.address,
        "main_process_port": nodes.port,
        "mixed_precision": "no",
        "num_machines": nodes.count,
        "num_processes": processes,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def forwarded_signals(logs: Path) -> Iterator[set[int]]:
    """Send signals that ask to stop on to all workers, and wait for what the workers do; yields those received.

    Args:
        logs: folder in which torch's agent makes something just before it starts the workers.
    """
    received: set[int] = set()

    def forward(number: int, frame: FrameType | None) -> None:
        import psutil

        received.add(number)
        if not any(logs.iterdir()):
            raise RunError(f"stopped by {signal.Signals(number).name} before training began")
        for worker in psutil.Process().children():
            # Not its group: what a worker started is the worker's to stop.
            with suppress(psutil.NoSuchProcess):
                worker.send_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    after: dict[int, Any] = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
    try:
        yield received
        after = before
    finally:
        # After an error this process is about to end, and Slurm may ask it to, because another node has ended.
        for number, handler in after.items():
            signal.signal(number, handler)
