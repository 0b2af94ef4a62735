"""The command line: one thin function for each verb. Heavy imports live inside the verb that needs them."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo_cli.errors import EXPECTED_ERRORS, UserError
from grpo_cli.hub import without_bars
from grpo_cli.launch.failures import exit_code, reported
from grpo_cli.recipe.addresses import DEFAULT_PORT
from grpo_cli.verbs.completion import complete_recipe, complete_setting, set_key_aside
from grpo_cli.verbs.init import STARTS
from grpo_cli.verbs.init import init as write_files

if TYPE_CHECKING:
    from grpo_cli.recipe.schema import Recipe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models with GRPO from a YAML recipe.",
)

recipe_app = typer.Typer(no_args_is_help=True, help="Compare recipes.")
app.add_typer(recipe_app, name="recipe")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.", autocompletion=complete_recipe)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, such as train.max_steps=3. Repeatable.",
        autocompletion=complete_setting,
    ),
]


def _load(recipe: Path, overrides: list[str] | None) -> Recipe:
    from grpo_cli.recipe.load import load_recipe

    return load_recipe(recipe, overrides or [])


@app.command()
def train(
    recipe: RecipePath,
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    server: Annotated[
        list[str] | None,
        typer.Option("--server", metavar="HOST[:PORT]", help="Generate on this grpo serve. Repeatable."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Processes over all nodes; the recipe's if not given.")
    ] = None,
) -> None:
    """Train the recipe's model."""
    from grpo_cli.launch.launcher import launch_if_needed
    from grpo_cli.recipe.overrides import server_overrides

    with reported():
        overrides = [*server_overrides(server or []), *(set_ or [])]
        if processes is not None:
            overrides.append(f"distributed.processes={processes}")
        loaded = _load(recipe, overrides)
        launch_if_needed(loaded, sys.argv[1:])

        from grpo_cli.train.api import train as run_training

        run_training(loaded, resume=resume)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="Hub id or folder.")],
    tp: Annotated[
        str, typer.Option("--tp", metavar="N", help="GPUs that share the model; auto for as many as can.")
    ] = "1",
    dp: Annotated[int, typer.Option("--dp", min=1, help="Copies of the model.")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = DEFAULT_PORT,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key; made, for you alone, if it is not there.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision; the model's own, float32 on a CPU.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest prompt and completion.")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="Share of the GPU's memory.")] = None,
    stop_with_stdin: Annotated[bool, typer.Option("--stop-with-stdin", hidden=True)] = False,
) -> None:
    """Serve rollouts with vLLM. Options that are not listed here go to vLLM as they are."""
    from grpo_cli.serve.environment import restart_if_needed

    if tp != "auto" and not re.fullmatch("[1-9][0-9]{0,3}", tp):
        raise UserError(f"--tp {tp}: write a number of GPUs, or auto")
    restart_if_needed()

    from grpo_cli.serve.server import ServeOptions
    from grpo_cli.serve.server import serve as run_server

    options = ServeOptions(
        model=model,
        host=host,
        port=port,
        api_key_file=api_key_file,
        tp=None if tp == "auto" else int(tp),
        dp=dp,
        dtype=dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        stop_with_stdin=stop_with_stdin,
        extra=context.args,
    )
    run_server(options)


@app.command()
def check(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|RUN", help="YAML recipe, or the folder of a run.", autocompletion=complete_recipe
        ),
    ],
    set_: Overrides = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory", metavar="GIB", min=1, help="Memory of each GPU; found here, or 80, if not given."
        ),
    ] = None,
) -> None:
    """Find mistakes in a recipe, its data and its rewards, and print the plan, without loading the model.

    Of a run's folder, verify the checkpoints and final/.
    """
    from rich.console import Console

    if recipe.is_dir():
        from grpo_cli.verbs.check_run import check_run

        if set_ or gpu_memory is not None:
            raise UserError(f"{recipe} is the folder of a run: --set and --gpu-memory are for recipes")
        return check_run(recipe, Console())
    loaded = _load(recipe, set_)

    from grpo_cli.verbs.check import check as check_recipe

    check_recipe(loaded, Console(), gpu_memory=gpu_memory)


@app.command()
def sample(
    recipe: RecipePath,
    num_prompts: Annotated[int, typer.Option("-n", min=1, help="Number of prompts.")] = 4,
    set_: Overrides = None,
) -> None:
    """Generate and score completions for a few prompts."""
    from rich.console import Console

    loaded = _load(recipe, set_)

    from grpo_cli.verbs.sample import sample as sample_prompts

    sample_prompts(loaded, num_prompts, Console())


@app.command("eval")
def eval_(
    recipe: RecipePath,
    model: Annotated[
        str | None, typer.Option("--model", help="Hub id, folder or checkpoint; the recipe's if not given.")
    ] = None,
    pass_at: Annotated[
        list[int] | None, typer.Option("--pass-at", help="k of pass@k. Repeatable. [1 and num_generations]")
    ] = None,
    pass_reward: Annotated[
        float, typer.Option("--pass-reward", help="Least weighted reward of a correct completion.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    set_: Overrides = None,
) -> None:
    """Mean reward, pass@k and lengths on the recipe's data.eval."""
    from rich.console import Console

    loaded = _load(recipe, set_)

    from grpo_cli.verbs.evaluate import eval_model

    eval_model(loaded, model, pass_at or [], pass_reward, as_json, Console())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, done or going on.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; report.html in the run's folder, of several here.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Print it in words instead.")] = False,
) -> None:
    """Write one HTML page about runs: what looks wrong, curves, completions. It needs no network."""
    from grpo_cli.verbs.report import print_in_words
    from grpo_cli.verbs.report import report as write_page

    if not text:
        typer.echo(write_page(runs, out, opens=open_))
    elif out is not None or open_:
        raise UserError("--text prints: it goes with neither --out nor --open")
    else:
        from rich.console import Console

        print_in_words(runs, Console())


@app.command()
def slurm(
    recipe: RecipePath,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job, those that serve included.")],
    serve_nodes: Annotated[
        int | None,
        typer.Option(
            min=0, help="Nodes that run grpo serve; 1 of several, none of one or where the recipe names servers."
        ),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="0 for nodes without GPUs.")] = 8,
    tp: Annotated[int | None, typer.Option(min=1, help="GPUs that share a served model; as many as can.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit in Slurm's words; the partition's own.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition; the cluster's default.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the script and print the job's id.")] = False,
    set_: Overrides = None,
) -> None:
    """Print the Slurm script that trains the recipe on several nodes, or submit it."""
    from grpo_cli.launch import slurm_script

    job = slurm_script.job_for_recipe(
        recipe, set_ or [],
        nodes=nodes, serve_nodes=serve_nodes, gpus_per_node=gpus_per_node, tp=tp, time=time, partition=partition,
    )  # fmt: skip
    script = slurm_script.render(job)
    typer.echo(slurm_script.submit(script) if submit else script, nl=submit)


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    step: Annotated[int | None, typer.Option("--step", help="Which step; the last that is stored.")] = None,
    group: Annotated[
        int | None, typer.Option("--group", help="Which group of it, from 0; all in a table.")
    ] = None,
) -> None:
    """Look at what a run said at a step: its groups, or the tokens of one."""
    from rich.console import Console

    from grpo_cli.verbs.inspect import inspect as inspect_step

    inspect_step(run, step, group, Console())


@recipe_app.command("diff")
def recipe_diff(
    before: Annotated[
        Path,
        typer.Argument(metavar="A", help="YAML recipe, or the folder of a run.", autocompletion=complete_recipe),
    ],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another one.", autocompletion=complete_recipe)],
) -> None:
    """Print what two recipes would do differently, defaults included, a line for each key."""
    from grpo_cli.verbs.recipe_diff import recipe_diff as find_differences

    found = find_differences(before, after)
    for difference in found:
        typer.echo(str(difference))
    if not found:
        typer.echo(f"no difference: {before} and {after} set the same values")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to.")],
    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="START",
            help=f"Starting point: {', '.join(STARTS)}.",
            autocompletion=lambda: STARTS,
        ),
    ] = STARTS[0],
) -> None:
    """Write a recipe and what it names to start from: rewards, prompts, tools or an environment."""
    for path in write_files(folder, start):
        typer.echo(f"wrote {path}")
    typer.echo(f"next: cd {shlex.quote(str(folder))} && grpo check recipe.yaml")


def main() -> None:
    """Run the command line; expected errors end in one message and their exit code, without a traceback."""
    # Deprecations are addressed to the programmers of the libraries involved, not to who runs a recipe.
    warnings.simplefilter("ignore", FutureWarning)
    without_bars(os.environ)
    set_key_aside(os.environ)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # models write what not every terminal can show
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="grpo")
    except EXPECTED_ERRORS as error:
        typer.echo(_shown(error), err=True)
        sys.exit(exit_code(error))


def _shown(error: Exception) -> str:
    if not isinstance(error, UserError):
        return str(error)
    from grpo_cli.recipe.links import with_links

    return with_links(error)


if __name__ == "__main__":
    main()
