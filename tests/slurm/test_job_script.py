"""The job script on an emulated cluster, with a stand-in for grpo: nodes, signals, exit codes, requeueing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job

pytestmark = pytest.mark.slow

Submit = Callable[..., Job]

TIMEOUT_S = 60


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Submit:
    """Submits one of `slurm/`, with the stand-in and what goes wrong with it."""
    grpo = tmp_path / "grpo"
    grpo.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_grpo.py")} "$@"\n')
    grpo.chmod(0o755)

    def submit_script(script: str, *options: str, **variables: str) -> Job:
        settings = {"GRPO": str(grpo), "RECIPE": "recipe.yaml", "MODEL": "it's a model"} | variables
        return cluster.submit(script, tmp_path, *options, **settings)

    return submit_script


def wait_for_training(job: Job) -> None:
    """Until all four nodes train: a signal would kill one that does not handle it yet."""
    logs = [job.logs / f"train-node{node}.log" for node in range(1, 5)]
    job.wait_until(lambda: all(log.exists() and "from step 0" in log.read_text() for log in logs), TIMEOUT_S)


def test_four_nodes_train_against_the_fifth_and_it_ends_with_them(submit: Submit) -> None:
    job = submit("5node.sh", TRAIN_ARGS="--set a=1", SERVE_ARGS="--max-model-len 64")
    state = job.wait(TIMEOUT_S)
    assert (state.name, state.exit_code) == ("COMPLETED", 0), job.log()
    assert sorted(path.name for path in job.logs.iterdir()) == [
        "serve-node5.log", "train-node1.log", "train-node2.log", "train-node3.log", "train-node4.log",
    ]  # fmt: skip
    for rank in range(4):
        log = (job.logs / f"train-node{rank + 1}.log").read_text()
        assert f"rank {rank} of 4 from step 0\ndone after step 8\n" in log
        command = log.splitlines()[0]
        for part in (
            "--set distributed.strategy=zero3 --set a=1 --server node5:8000", "--set model.name='it''s a model'",
            f"generation.server.api_key_file='runs/{job.name}/server-key'", "generation.server.timeout_s=600",
        ):  # fmt: skip
            assert part in command
        assert "--resume" not in command
    served = (job.logs / "serve-node5.log").read_text()
    assert "--model it's a model --tp auto --host 0.0.0.0 --port 8000" in served
    assert "--max-model-len 64" in served


def test_at_the_time_limit_all_nodes_stop_once_and_the_job_goes_on_where_they_stopped(submit: Submit) -> None:
    job = submit("5node.sh")
    wait_for_training(job)
    job.ask_to_stop()
    state = job.wait(TIMEOUT_S)
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", 0, 1), job.log()
    (checkpoint,) = job.run_folder.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    for rank in range(4):
        first, second = (job.logs / f"train-node{rank + 1}.log").read_text().split("train on ")[1:]
        assert "signals: 1\n" in first, "a second signal would end training without a checkpoint"
        assert "--resume" not in first
        assert "--resume" in second
        assert f"rank {rank} of 4 from step {step}\ndone after step 8\n" in second


def test_one_failing_node_ends_the_job_with_its_exit_code(submit: Submit) -> None:
    job = submit("5node.sh", FAKE="train-fails")
    state = job.wait(TIMEOUT_S)
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", 3, 0), job.log()


def test_training_does_not_begin_where_a_server_does_not_start(submit: Submit) -> None:
    job = submit("multi_server.sh", "--nodes=5", FAKE="serve-fails")
    state = job.wait(TIMEOUT_S)
    assert (state.name, state.exit_code) == ("FAILED", 1), job.log()
    assert "a server ended before all were ready" in job.log()
    assert "no such model" in job.log("serve-node4.log") + job.log("serve-node5.log")
    assert not list(job.logs.glob("train-*"))


def test_a_server_that_ends_stops_training_with_a_checkpoint_and_the_job_starts_again(submit: Submit) -> None:
    job = submit("5node.sh", FAKE="serve-dies")
    state = job.wait(TIMEOUT_S)
    assert (state.name, state.restarts) == ("COMPLETED", 1), job.log()
    assert "a server ended, its log is one of" in job.log()


def test_a_job_that_gets_nowhere_is_not_requeued(submit: Submit) -> None:
    job = submit("5node.sh", FAKE="no-progress")
    wait_for_training(job)
    job.ask_to_stop()
    state = job.wait(TIMEOUT_S)
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", 75, 0), job.log()
    assert "not requeued: no step was completed" in job.log()


def test_a_cancelled_job_stays_cancelled(submit: Submit, cluster: Cluster) -> None:
    job = submit("5node.sh")
    wait_for_training(job)
    cluster.run("scancel", job.id)
    state = job.wait(TIMEOUT_S)
    assert (state.name, state.restarts) == ("CANCELLED", 0), job.log()


def test_several_servers_share_a_key_and_all_are_named(submit: Submit) -> None:
    job = submit("multi_server.sh", "--nodes=5", PORT="8123")
    assert job.wait(TIMEOUT_S).name == "COMPLETED", job.log()
    assert "rank 2 of 3 from step 0" in (job.logs / "train-node3.log").read_text()
    assert "--server node4:8123 --server node5:8123" in (job.logs / "train-node1.log").read_text()
    for node in (4, 5):
        assert f"--api-key-file runs/{job.name}/server-key" in (job.logs / f"serve-node{node}.log").read_text()


def test_one_node_trains_without_servers(submit: Submit) -> None:
    job = submit("1node.sh", MODEL="")
    assert job.wait(TIMEOUT_S).name == "COMPLETED", job.log()
    command = (job.logs / "train-node1.log").read_text().splitlines()[0]
    assert "--server" not in command
    assert "model.name" not in command


def test_what_cannot_work_is_said_at_once(submit: Submit) -> None:
    for variables, message in (
        ({"MODEL": ""}, "with RECIPE, set MODEL to its model.name"),
        ({"SERVE_NODES": "5"}, "SERVE_NODES=5 leaves none of the 5 nodes to train on"),
        ({"GRPO": "no-such-command"}, "there is no command no-such-command here"),
    ):
        job = submit("5node.sh", **variables)
        state = job.wait(TIMEOUT_S)
        assert (state.name, state.exit_code) == ("FAILED", 2), job.log()
        assert message in job.log()
