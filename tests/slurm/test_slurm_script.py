"""Rendering of the job script, and `grpo slurm`."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_cli.errors import UserError
from grpo_cli.launch.slurm_script import (
    EXAMPLES,
    TEMPLATE,
    VARIABLES,
    Job,
    job_for_recipe,
    render,
    submit,
)
from tests.slurm.cluster import SCRIPTS

BASH = shutil.which("bash")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    return write(tmp_path / "my recipe.yaml")


def write(path: Path, **sections: Any) -> Path:
    recipe = {
        "model": {"name": "org/model"},
        "data": {"name": "org/data"},
        "rewards": ["rewards.length:reward_len"],
        "train": {"output_dir": "runs/it's here", "max_steps": 3},
    }
    path.write_text(yaml.safe_dump(recipe | sections))
    return path


def plan(path: Path, *settings: str, **options: Any) -> Job:
    defaults = {"nodes": 5, "serve_nodes": None, "gpus_per_node": 8, "tp": None, "time": None, "partition": None}
    return job_for_recipe(path, settings, **(defaults | options))


def variables_of(script: str, **environment: str) -> dict[str, str]:
    """What bash makes of the head of a script."""
    head, _, _ = script.partition("\nsay() {")
    names = [*VARIABLES, "train_args", "serve_args"]
    dump = "\n".join(f'printf "%s\\0" {name} "${{{name}[@]-}}" END' for name in names)
    output = subprocess.run(
        [BASH or "bash", "-c", f"{head}\n{dump}"], env={"PATH": os.environ["PATH"], **environment},
        capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    values = {}
    for name in names:
        start = output.index(name)
        values[name] = shlex.join(output[start + 1 : output.index("END", start)])
    return values


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_scripts_in_slurm_are_what_the_template_gives(name: str) -> None:
    path = SCRIPTS / name
    assert path.read_text() == render(EXAMPLES[name]), "run: python -m grpo_cli.launch.slurm_script slurm"
    assert os.access(path, os.X_OK)
    assert subprocess.run([BASH or "bash", "-n", str(path)], check=False).returncode == 0


def test_all_examples_are_in_the_folder() -> None:
    assert {path.name for path in SCRIPTS.glob("*.sh")} == set(EXAMPLES)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck_finds_nothing() -> None:
    files = [TEMPLATE, *SCRIPTS.glob("*.sh"), *(Path(__file__).parent / "emulator").glob("*.sh")]
    done = subprocess.run(["shellcheck", *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_script_of_a_recipe_holds_what_the_recipe_says(recipe_path: Path) -> None:
    script = render(plan(recipe_path, "train.max_steps=7", time="1-00:00:00", partition="gpu"))
    lines = script.splitlines()
    for option in (
        "--job-name=grpo-my-recipe", "--nodes=5", "--ntasks-per-node=1", "--gres=gpu:8", "--time=1-00:00:00",
        "--partition=gpu", "--signal=B:USR1@300", "--requeue", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {option}" in lines
    assert lines.index("set -euo pipefail") > lines.index("#SBATCH --nodes=5"), "sbatch stops reading at commands"
    values = variables_of(script)
    assert values["RECIPE"] == shlex.quote(str(recipe_path))
    assert values["MODEL"] == "org/model"
    assert values["RUN_DIR"] == shlex.quote("runs/it's here")
    assert (values["SERVE_NODES"], values["TP"], values["PORT"]) == ("1", "auto", "8000")
    assert values["train_args"] == "--set train.max_steps=7"
    assert values["GRPO"] == str(Path(sys.executable).with_name("grpo"))


def test_the_environment_overrides_every_variable() -> None:
    script = render(EXAMPLES["5node.sh"])
    slurm = {"SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "7"}
    assert variables_of(script, **slurm)["RUN_DIR"] == "runs/name-7"
    given = {name: f"my {name.lower()}" for name in VARIABLES}
    values = variables_of(script, **slurm, **given)
    assert {name: values[name] for name in VARIABLES} == {
        name: shlex.quote(value) for name, value in given.items()
    }


@pytest.mark.parametrize("name", [*EXAMPLES, "unique_chars_72b.yaml", "slow.yaml"])
def test_the_script_waits_longer_than_training_waits_for_a_lost_server(name: str, tmp_path: Path) -> None:
    """Training then still has its checkpoint to write."""
    slow = {"engine": "vllm_server", "server": {"urls": ["a"], "timeout_s": 7200.5}}
    path = write(tmp_path / name, generation=slow) if name == "slow.yaml" else RECIPES / name
    job = EXAMPLES[name] if name in EXAMPLES else plan(path, serve_nodes=1)
    script = render(job)
    values = variables_of(script, SLURM_JOB_NAME="name", SLURM_JOB_ID="7")
    expected = {"unique_chars_72b.yaml": "1800", "slow.yaml": "7201"}.get(name, "600")
    assert values["SERVER_TIMEOUT_S"] == expected
    assert int(values["STOP_TIMEOUT_S"]) == int(expected) + 900
    assert '--set "generation.server.timeout_s=$SERVER_TIMEOUT_S"' in script
    given = {"SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "7", "SERVER_TIMEOUT_S": "1000"}
    assert variables_of(script, **given)["STOP_TIMEOUT_S"] == "1900"


def test_another_recipe_does_not_keep_the_examples_model() -> None:
    slurm = {"SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "7"}
    assert variables_of(render(EXAMPLES["5node.sh"]), RECIPE="mine.yaml", **slurm)["MODEL"] == "''"


def test_servers_get_what_the_recipe_says_of_the_model_and_of_vllm(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.yaml",
        model={"name": "org/model", "revision": "v2", "trust_remote_code": True},
        generation={
            "engine": "vllm_server",
            "server": {"spawn": True, "tensor_parallel_size": 2},
            "vllm": {"max_model_len": 4096},
        },
    )
    job = plan(path)
    assert list(job.serve_options) == ["--revision", "v2", "--trust-remote-code", "--max-model-len", "4096"]
    assert (job.serve_nodes, job.tp) == (1, None), "no shape is known of org/model"
    assert plan(path, nodes=1).serve_nodes == 0


def test_a_recipe_that_names_its_servers_gets_none_from_the_job(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", generation={"engine": "vllm_server", "server": {"urls": ["10.0.0.5"]}})
    assert plan(path).serve_nodes == 0


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("Qwen/Qwen2-0.5B-Instruct", 2), ("Qwen/Qwen2.5-1.5B-Instruct", 4), ("Qwen/Qwen2.5-72B", 8),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 3),
    ],
)  # fmt: skip
def test_a_server_takes_as_many_gpus_of_its_node_as_can_share_the_model(
    recipe_path: Path, name: str, most: int
) -> None:
    job = plan(recipe_path, f"model.name={name}")
    assert job.tp == most
    assert variables_of(render(job))["TP"] == str(most)
    assert plan(recipe_path, f"model.name={name}", gpus_per_node=0).tp == 1


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (
            {"tp": 8},
            ("model.name=Qwen/Qwen2-0.5B-Instruct",),
            "--tp 8: 8 GPUs cannot share Qwen/Qwen2-0.5B-Instruct, which has 14 attention heads, 2 of keys and an "
            "MLP of 4864; write --tp 2, or leave it out",
        ),
        ({"nodes": 2, "serve_nodes": 2}, (), "--serve-nodes 2 leaves none of --nodes 2 to train on"),
        ({"tp": 16}, (), "--tp 16: a server has the 8 GPUs of its node"),
        ({"time": "1:00\n#SBATCH --uid=0"}, (), "--time"),
        ({"partition": "a b"}, (), "--partition 'a b'"),
        ({}, ("train.max_stepz=1",), "train.max_stepz is not a setting"),
        ({}, ("generation.vllm.max_model_len=64",), "generation.vllm has no server or engine to go to"),
        ({"serve_nodes": 0}, ("generation.engine=vllm_server",), "generation.server needs exactly one of urls"),
        ({"serve_nodes": 0}, ("generation.engine=vllm",), "vllm is for one process, and 5 x 8 GPUs are for more"),
        ({}, ("model.name=some/model.gguf",), "is a GGUF file, which the job's servers do not load"),
    ],
)
def test_what_cannot_both_be_meant_is_refused(
    recipe_path: Path, options: dict[str, Any], settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError) as error:
        plan(recipe_path, *settings, **options)
    assert message in str(error.value)


# The verb


def grpo_slurm(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo_cli.cli", "slurm", *map(str, arguments)],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("processes", "gpus"), [(30, 8), (64, 8), (33, 0)])
def test_processes_that_the_training_nodes_cannot_share_are_refused(
    recipe_path: Path, processes: int, gpus: int
) -> None:
    with pytest.raises(UserError, match=f"distributed.processes is {processes}, which 4 training nodes of {gpus}"):
        plan(recipe_path, f"distributed.processes={processes}", gpus_per_node=gpus)


@pytest.mark.parametrize(("processes", "gpus"), [(16, 8), (32, 8), (400, 0)])
def test_processes_that_the_training_nodes_can_share_are_taken(
    recipe_path: Path, processes: int, gpus: int
) -> None:
    job = plan(recipe_path, f"distributed.processes={processes}", gpus_per_node=gpus)
    assert f"distributed.processes={processes}" in job.settings


def test_the_verb_prints_the_script(recipe_path: Path) -> None:
    done = grpo_slurm(recipe_path, "--nodes", "3", "--serve-nodes", "2", "--tp", "4", "--set", "train.seed=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == render(plan(recipe_path, "train.seed=1", nodes=3, serve_nodes=2, tp=4))


def test_a_wrong_recipe_is_one_message_and_exit_code_2(recipe_path: Path) -> None:
    done = grpo_slurm(recipe_path, "--nodes", "5", "--set", "loss.epsilom=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean loss.epsilon?" in done.stderr
    assert "Traceback" not in done.stderr


def test_submit_hands_over_the_script_without_variables_that_would_change_it(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words; cat > {tmp_path}/script; echo "${{TP:-none}}" '
                      f'> {tmp_path}/tp; echo "42;cluster"\n')  # fmt: skip
    sbatch.chmod(0o755)
    done = grpo_slurm(recipe_path, "--nodes", "5", "--submit", PATH=f"{tmp_path}:{os.environ['PATH']}", TP="3")
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert (tmp_path / "words").read_text() == "--parsable\n"
    assert (tmp_path / "script").read_text() == render(plan(recipe_path))
    assert (tmp_path / "tp").read_text() == "none\n"


def test_submit_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cannot run sbatch: No such file or directory"):
        submit("script")


def test_what_sbatch_refuses_is_told_in_its_words(recipe_path: Path, tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: nope' >&2; exit 1\n")
    sbatch.chmod(0o755)
    done = grpo_slurm(recipe_path, "--nodes", "5", "--submit", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "invalid partition specified: nope" in done.stderr
