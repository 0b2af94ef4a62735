"""One command becomes several processes, which end together, whatever ends them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from grpo_cli.distributed.environment import Nodes
from grpo_cli.errors import UserError
from grpo_cli.launch import launcher
from grpo_cli.launch.failures import STOP_SIGNALS
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import Recipe
from tests.launch.launcher import main as launcher_main
from tests.processes import Command

# --- what is started ---


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of `run_workers`, in an environment that no launcher made."""
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launcher, "run_workers", lambda *arguments: calls.append(arguments))
    return calls


def recipe(**sections: Any) -> Recipe:
    return load_recipe(
        {
            "model": {"name": "m"},
            "data": {"name": "d"},
            "rewards": ["r:r"],
            "train": {"output_dir": "o", "max_steps": 1},
            **sections,
        }
    )


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def in_step(monkeypatch: pytest.MonkeyPatch, nodes: int) -> None:
    variables = {
        "SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_PROCID": 0, "SLURM_NODEID": 0,
        "SLURM_NNODES": nodes, "SLURM_NTASKS": nodes, "MASTER_ADDR": "node1", "MASTER_PORT": 29500,
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("distributed", [{}, {"processes": 1}, {"strategy": "zero3"}])
def test_one_process_needs_no_launcher(started: list[Any], distributed: dict[str, Any]) -> None:
    launcher.launch_if_needed(recipe(distributed=distributed), ["train", "r.yaml"])
    assert started == []


def test_a_worker_does_not_launch(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launcher.launch_if_needed(recipe(distributed={"processes": 2}), ["train", "r.yaml"])
    assert started == []


def test_several_processes_get_the_same_command_line(started: list[Any]) -> None:
    with pytest.raises(SystemExit) as end:
        launcher.launch_if_needed(recipe(distributed={"processes": 2}), ["train", "r.yaml", "--processes", "2"])
    assert end.value.code == 0
    assert started == [("grpo_cli.cli", ["train", "r.yaml", "--processes", "2"], 2, Nodes())]


def test_more_processes_than_gpus_are_an_error(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    with pytest.raises(UserError, match="8 processes on this machine are more than its 4 GPUs"):
        launcher.launch_if_needed(recipe(distributed={"processes": 8}), [])
    assert started == []


@pytest.mark.parametrize(("count", "left"), [(8, 6), (3, 1), (2, 2), (1, 1)])
def test_a_spawned_servers_gpus_are_not_for_training(
    monkeypatch: pytest.MonkeyPatch, count: int, left: int
) -> None:
    gpus(monkeypatch, count)
    generation = {"engine": "vllm_server", "server": {"spawn": True, "tensor_parallel_size": 2}}
    assert launcher.training_gpus(recipe(generation=generation), Nodes(2, 0)) == left
    assert launcher.training_gpus(recipe(generation=generation), Nodes(2, 1)) == count, "it runs on the first node"


def test_a_contradiction_is_found_before_anything_starts(started: list[Any], tmp_path: Path) -> None:
    distributed = {"processes": 2, "deepspeed_config": str(tmp_path / "nowhere.json")}
    with pytest.raises(UserError, match="cannot be read"):
        launcher.launch_if_needed(recipe(distributed=distributed), [])
    assert started == []


@pytest.mark.parametrize(("count", "processes"), [(8, 16), (0, 2)])
def test_under_srun_each_gpu_gets_a_process_or_each_node_one(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, count: int, processes: int
) -> None:
    in_step(monkeypatch, 2)
    gpus(monkeypatch, count)
    with pytest.raises(SystemExit):
        launcher.launch_if_needed(recipe(), ["train"])
    assert started == [("grpo_cli.cli", ["train"], processes, Nodes(2, 0, "node1", 29500))]


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_must_divide_among_the_nodes(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    in_step(monkeypatch, 2)
    with pytest.raises(UserError, match=f"is {processes}, which does not divide among 2 nodes"):
        launcher.launch_if_needed(recipe(distributed={"processes": processes}), ["train"])
    assert started == []


# --- what it does ---


class Launch:
    """A launcher of stand-in workers, in a folder to which those write."""

    def __init__(self, processes: int, what: str, folder: Path, **more: str):
        self.folder, self.temporary = folder / "told", folder / "temporary"
        self.folder.mkdir(exist_ok=True)
        self.temporary.mkdir(exist_ok=True)
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))
        }
        environment |= {"TMPDIR": str(self.temporary), "HF_HOME": str(folder / "home"), **more}
        arguments = (str(processes), what, self.folder)
        self.process = Command(*arguments, environment=environment, main=launcher_main, errors_apart=True)

    def end(self, timeout_s: float = 60) -> tuple[int, list[str]]:
        """The exit code and the lines on stderr; what it made in the temporary folder must be gone."""
        _, errors = self.process.communicate(timeout=timeout_s)
        assert list(self.temporary.iterdir()) == []
        return self.process.returncode, errors.splitlines()

    def told(self, kind: str, count: int) -> list[Any]:
        """What the first `count` ranks wrote, once all have."""
        paths = [self.folder / f"{kind}-{rank}" for rank in range(count)]
        wait_for(lambda: all(path.exists() for path in paths))
        return [json.loads(path.read_text()) for path in paths]


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def wait_gone(pids: list[int], timeout_s: float = 10) -> None:
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), timeout_s)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    launches: list[Launch] = []

    def start(processes: int, what: str, **more: str) -> Launch:
        launches.append(Launch(processes, what, tmp_path, **more))
        return launches[-1]

    yield start
    for one in launches:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(one.process.pid).children(recursive=True)
        one.process.kill()
        for process in family:
            process.kill()
        one.process.communicate()


def test_all_start_with_their_ranks_and_as_plain_processes(launch: Callable[..., Launch], tmp_path: Path) -> None:
    # A default file of the user's, which Accelerate reads where it is given none.
    default = tmp_path / "home" / "accelerate" / "default_config.yaml"
    default.parent.mkdir(parents=True)
    default.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n"
    )
    run = launch(3, "ranks", OMP_NUM_THREADS="5")
    assert run.end() == (0, [])
    environments = run.told("environment", 3)
    for rank, environment in enumerate(environments):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert environment["OMP_NUM_THREADS"] == "5"
        assert environment["MASTER_PORT"] == environments[0]["MASTER_PORT"]
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
        assert environment["ACCELERATE_USE_CPU"] is environment["ACCELERATE_USE_DEEPSPEED"] is None


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [("wrong", 2, "recipe.yaml:3: loss.epsilom is not a setting"), ("failed", 1, "the disk is full")],
)
def test_an_expected_error_of_all_ranks_is_one_message(
    launch: Callable[..., Launch], what: str, code: int, line: str
) -> None:
    assert launch(2, what).end() == (code, [line])


@pytest.mark.slow
def test_the_cause_is_named_and_not_who_lost_contact_with_it(launch: Callable[..., Launch]) -> None:
    code, lines = launch(2, "bug-and-lost-contact").end()
    assert code == 1
    assert lines[0].startswith("rank 1 (")
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1].startswith("rank 1 (")
    assert lines[-1].endswith("failed: ValueError: the cause")
    assert "Connection closed" not in "".join(lines)


def test_an_exit_without_an_error_names_rank_and_code(launch: Callable[..., Launch]) -> None:
    code, lines = launch(2, "exit").end()
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("rank 1 (")
    assert "ended with exit code 7" in lines[0]


@pytest.mark.slow
def test_a_rank_killed_while_others_wait_for_it_ends_the_job_in_a_minute(launch: Callable[..., Launch]) -> None:
    run = launch(3, "barrier")
    pids = run.told("pid", 3)
    time.sleep(0.5)  # until the others are in the barrier
    os.kill(pids[1], signal.SIGKILL)
    code, lines = run.end(60)
    assert code == 1
    assert f"pid {pids[1]}) was killed by SIGKILL" in lines[-1]
    assert lines[-1].startswith("rank 1 (")
    wait_gone(pids)


@pytest.mark.slow
def test_a_bug_ends_the_job_in_a_minute_even_if_the_others_hang(launch: Callable[..., Launch]) -> None:
    run = launch(2, "bug-while-others-hang", TEST_GRACE_S="8")
    pids = run.told("pid", 1)
    code, lines = run.end(60)
    assert code == 1
    assert lines[-1].endswith("failed: ValueError: the cause")
    wait_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_reaches_every_worker_once_and_the_launcher_waits(
    launch: Callable[..., Launch], number: signal.Signals
) -> None:
    run = launch(2, "train")
    pids = run.told("pid", 2)
    run.process.send_signal(number)
    os.kill(pids[1], number)  # as Slurm does, which signals the launcher and the workers
    code, lines = run.end()
    assert code == 75
    assert lines[-1] == "stopped by a signal with a checkpoint"
    assert len(lines) == 2  # and the notice of rank 0
    assert run.told("checkpoint", 2) == [number.name] * 2


@pytest.mark.slow
def test_a_second_signal_stops_at_once(launch: Callable[..., Launch]) -> None:
    run = launch(2, "hang-after-signal")
    run.told("pid", 2)
    run.process.send_signal(signal.SIGTERM)
    run.told("signalled", 2)
    time.sleep(2.5)
    run.process.send_signal(signal.SIGTERM)
    code, lines = run.end(20)
    assert code == 1
    assert lines[-1].startswith("stopped at once by SIGTERM")


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_worker_and_its_folder_to_the_next(
    launch: Callable[..., Launch],
) -> None:
    run = launch(2, "hang")
    pids = run.told("pid", 2)
    run.process.kill()
    wait_gone(pids)
    assert [path.name.startswith("grpo-launch-") for path in run.temporary.iterdir()] == [True]
    code, errors = launch(2, "ranks").end()  # which sees that nothing is left
    assert code == 0, errors


# --- several nodes, here all on one machine ---


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 2), (1, 3)])
def test_nodes_meet_and_number_their_ranks_through(launch: Callable[..., Launch], counts: tuple[int, int]) -> None:
    """Of as many processes each, or of fewer where the first node has a server of its own."""
    from grpo_cli.rollout.server.spawned_server import free_port

    port = str(free_port())
    runs = [launch(2 * own, "ranks", TEST_NODES=f"2 {i} 127.0.0.1 {port}") for i, own in enumerate(counts)]
    for index, run in enumerate(runs):
        _, errors = run.process.communicate(timeout=60)
        assert run.process.returncode == 0, errors
        assert f"node {index} of 2: {counts[index]} processes, meeting at 127.0.0.1:{port}" in errors
    told = runs[0].told("environment", 4)
    local = [str(rank) for own in counts for rank in range(own)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in told] == [
        (str(rank), local[rank], "4") for rank in range(4)
    ]
