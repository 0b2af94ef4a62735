"""`grpo slurm`: the job script for a recipe, made from the template `slurm_script.sh`. No torch import.

The scripts in `slurm/` come from the same template. After a change of it
`python -m grpo_cli.launch.slurm_script slurm` (`make docs`) writes them again.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_cli.errors import RunError, UserError
from grpo_cli.plan.shape import model_size
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.overrides import server_overrides
from grpo_cli.recipe.raw import read_yaml
from grpo_cli.recipe.schema import ModelConfig, ServerConfig
from grpo_cli.recipe.vllm_arguments import refused_vllm_arguments
from grpo_cli.serve.engine_arguments import as_options, can_share, most_sharing

TEMPLATE = Path(__file__).with_name("slurm_script.sh")

VARIABLES = (
    "RECIPE", "MODEL", "RUN_DIR", "SERVE_NODES", "TP", "PORT", "TRAIN_ARGS", "SERVE_ARGS", "RESUME",
    "START_TIMEOUT_S", "SERVER_TIMEOUT_S", "STOP_TIMEOUT_S", "GRPO",
)  # fmt: skip
"""What the environment of sbatch may set; `submit` keeps it from changing a script that was made for a recipe."""

FOLDER_OF_ITS_OWN = "runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"
"""The run folder of a script that is submitted again and again: the same one when the job is requeued."""


@dataclass(frozen=True)
class Job:
    """What one script has in other words or numbers than the next."""

    title: str
    usage: str
    name: str
    recipe: str
    model: str
    nodes: int
    serve_nodes: int
    gpus_per_node: int
    tp: int | None = None
    """GPUs that share a served model. If None, each server finds out how many of its GPUs can."""
    run_dir: str | None = None
    """The run's folder. If None, each job has its own."""
    settings: Sequence[str] = ()
    """`key.path=value` strings for `grpo train --set`."""
    serve_options: Sequence[str] = ()
    """Further words of the command line of `grpo serve`."""
    server_timeout_s: float = ServerConfig().timeout_s
    """The recipe's `generation.server.timeout_s`. A script that gave up earlier would get no checkpoint."""
    time: str | None = None
    partition: str | None = None
    chdir: str | None = None
    """Folder that the job runs in. If None, the one that it was submitted from."""
    grpo: str = "grpo"


EXAMPLES = {
    "5node.sh": Job(
        title="GRPO on five nodes of eight GPUs: four train with ZeRO-3, the fifth generates.",
        usage="RECIPE=recipes/gsm8k.yaml MODEL=Qwen/Qwen2.5-7B-Instruct sbatch slurm/5node.sh",
        name="grpo-5node",
        recipe="recipes/tldr_len.yaml",
        model="Qwen/Qwen2-0.5B-Instruct",
        nodes=5,
        serve_nodes=1,
        gpus_per_node=8,
        settings=("distributed.strategy=zero3",),
        time="24:00:00",
    )
}
EXAMPLES["1node.sh"] = replace(
    EXAMPLES["5node.sh"],
    title="GRPO on one node of eight GPUs, generating as the recipe says; it may start a server of its own.",
    usage="RECIPE=recipes/gsm8k.yaml MODEL=Qwen/Qwen2.5-7B-Instruct sbatch slurm/1node.sh",
    name="grpo-1node",
    nodes=1,
    serve_nodes=0,
)
EXAMPLES["multi_server.sh"] = replace(
    EXAMPLES["5node.sh"],
    title="GRPO on eight nodes of eight GPUs: six train with ZeRO-3, two generate, with a server each.",
    usage="SERVE_NODES=3 sbatch --nodes=9 slurm/multi_server.sh",
    name="grpo-multi-server",
    nodes=8,
    serve_nodes=2,
)


def render(job: Job) -> str:
    """The job script."""
    values = {
        "TITLE": job.title,
        "USAGE": job.usage,
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in sbatch_options(job)),
        "RECIPE": shlex.quote(job.recipe),
        "MODEL": shlex.quote(job.model),
        "RUN_DIR": FOLDER_OF_ITS_OWN if job.run_dir is None else shlex.quote(job.run_dir),
        "SERVE_NODES": str(job.serve_nodes),
        "TP": str(job.tp or "auto"),
        "GRPO": shlex.quote(job.grpo),
        "TRAIN_WORDS": shlex.join([word for setting in job.settings for word in ("--set", setting)]),
        "SERVE_WORDS": shlex.join(job.serve_options),
        "SERVER_TIMEOUT_S": str(math.ceil(job.server_timeout_s)),
    }
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def sbatch_options(job: Job) -> list[str]:
    """What the job asks of Slurm."""
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *([f"--gres=gpu:{job.gpus_per_node}"] if job.gpus_per_node else []),
        "--exclusive",
        "--mem=0",
        *([f"--time={job.time}"] if job.time else []),
        *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--chdir={shlex.quote(job.chdir)}"] if job.chdir else []),
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    ]


def job_for_recipe(
    path: Path,
    settings: Sequence[str],
    *,
    nodes: int,
    serve_nodes: int | None,
    gpus_per_node: int,
    tp: int | None,
    time: str | None,
    partition: str | None,
) -> Job:
    """The job that trains a recipe.

    Args:
        path: of the recipe.
        settings: `key.path=value` strings, as after `--set`.
        nodes: number of nodes, those that serve included.
        serve_nodes: how many of them run servers. If None, one where there are several nodes and the recipe names
            no servers, else none.
        gpus_per_node: 0 for nodes without GPUs.
        tp: GPUs that share the model of a server. If None, as many of a node's as can.
        time: time limit in Slurm's words, such as 1-12:00:00.
        partition: name of Slurm's partition.

    Raises:
        UserError: the recipe is wrong, or it contradicts the options.
    """
    written = read_yaml(path).values.get("generation")  # as in the file, before the overrides for the servers
    generation = written if isinstance(written, dict) else {}
    if serve_nodes is None:
        serve_nodes = int(nodes > 1 and not _names_servers(generation))
    if serve_nodes >= nodes:
        raise UserError(
            f"--serve-nodes {serve_nodes} leaves none of --nodes {nodes} to train on; raise --nodes, or lower it"
        )
    servers = server_overrides([f"node{index}" for index in range(serve_nodes)])
    recipe = load_recipe(path, [*servers, *settings])
    if serve_nodes:
        tp = _tensor_parallel(recipe.model, tp, max(1, gpus_per_node))
    for name, value in (("--time", time), ("--partition", partition)):
        if value is not None and not re.fullmatch(r"[\w.,:+-]+", value):
            raise UserError(f"{name} {value!r} is no value that sbatch takes")
    if not serve_nodes and recipe.generation.engine == "vllm" and nodes * gpus_per_node > 1:
        raise UserError(
            f"generation.engine: vllm is for one process, and {nodes} x {gpus_per_node} GPUs are for more; "
            "write engine: vllm_server, or give it servers with --serve-nodes 1"
        )
    server = recipe.generation.server or ServerConfig()
    train_nodes, processes = nodes - serve_nodes, recipe.distributed.processes
    if processes is not None and (processes % train_nodes or 0 < gpus_per_node * train_nodes < processes):
        raise UserError(
            f"distributed.processes is {processes}, which {train_nodes} training nodes of {gpus_per_node} GPUs "
            "cannot share; change --nodes or --serve-nodes, or leave it empty"
        )
    count = f"{nodes} nodes" if nodes > 1 else "one node"
    return Job(
        title=f"GRPO on {count}, made by grpo slurm from {path.name}.".replace("\n", " "),
        usage="sbatch --account=mine THIS_FILE        options of sbatch win over those below",
        name="grpo-" + (re.sub(r"[^\w.-]", "-", path.stem, flags=re.ASCII) or "recipe"),
        recipe=str(path.absolute()),
        model=recipe.model.name,
        nodes=nodes,
        serve_nodes=serve_nodes,
        gpus_per_node=gpus_per_node,
        tp=tp,
        run_dir=str(Path(recipe.train.output_dir).expanduser()),
        settings=settings,
        serve_options=_serve_options(recipe.model, _vllm_arguments(generation, recipe.model, path))
        if serve_nodes
        else (),
        server_timeout_s=server.timeout_s,
        time=time,
        partition=partition,
        chdir=os.getcwd(),
        grpo=_own_command(),
    )


def _names_servers(generation: Mapping[str, Any]) -> bool:
    """Whether the recipe says where servers run already. What is wrong with it is for `load_recipe` to find."""
    server = generation.get("server")
    return isinstance(server, dict) and bool(server.get("urls"))


def _vllm_arguments(generation: Mapping[str, Any], model: ModelConfig, path: Path) -> Mapping[str, Any]:
    """`generation.vllm` as the file has it: for the servers of the job, so that `server_overrides` clears it."""
    arguments = generation.get("vllm")
    if not isinstance(arguments, dict):
        return {}
    for name, reason in refused_vllm_arguments(arguments, model.trust_remote_code):
        raise UserError(f"{path}: generation.vllm.{name} {reason}")
    return arguments


def _tensor_parallel(model: ModelConfig, wanted: int | None, gpus: int) -> int | None:
    """What was asked for, or as many of a node's GPUs as can share the model; None if its shape is not known."""
    if wanted is not None and wanted > gpus:
        raise UserError(f"--tp {wanted}: a server has the {gpus} GPUs of its node; lower it")
    shape = model_size(model, Path(model.name).expanduser()).shape
    if shape is None:
        return wanted
    split = shape.heads, shape.kv_heads, shape.intermediate
    if wanted is not None and not can_share(wanted, *split):
        raise UserError(
            f"--tp {wanted}: {wanted} GPUs cannot share {model.name}, which has {shape.heads} attention heads, "
            f"{shape.kv_heads} of keys and an MLP of {shape.intermediate}; "
            f"write --tp {most_sharing(wanted, *split)}, or leave it out"
        )
    return wanted or most_sharing(gpus, *split)


def _serve_options(model: ModelConfig, arguments: Mapping[str, Any]) -> list[str]:
    """What `grpo serve` must know to serve the model that is trained."""
    if model.gguf_file is not None or model.name.endswith(".gguf"):
        raise UserError(
            f"model.name: {model.name} is a GGUF file, which the job's servers do not load; save the model in "
            "Hugging Face format, or train without servers (--serve-nodes 0)"
        )
    given = {"revision": model.revision, "tokenizer": model.tokenizer}
    options = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    if model.trust_remote_code:
        options.append("--trust-remote-code")
    return [*options, *as_options(arguments)]


def _own_command() -> str:
    """The `grpo` of this environment, so that the job finds it whatever its PATH."""
    beside = Path(sys.executable).with_name("grpo")
    return str(beside) if beside.is_file() else "grpo"


def submit(script: str) -> str:
    """Hand a script to sbatch and return the job's id.

    Raises:
        UserError: there is no sbatch on this machine.
        RunError: sbatch refused the job.
    """
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UserError(
            f"grpo slurm --submit: cannot run sbatch: {error.strerror}; run it on a machine of the cluster, or "
            "leave --submit out and take the script there"
        ) from error
    if done.returncode != 0:
        raise RunError(f"grpo slurm --submit: {done.stderr.strip() or f'sbatch ended with {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]


def main() -> None:
    """Write the example scripts into the folder that is named on the command line."""
    folder = Path(sys.argv[1])
    for name, job in EXAMPLES.items():
        path = folder / name
        path.write_text(render(job), encoding="utf-8")
        path.chmod(0o755)


if __name__ == "__main__":
    main()
