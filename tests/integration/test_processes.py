"""The real command line with several processes: the split changes nothing, and ends are clean."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from grpo_cli.record.completions import POLICY_LOGPROBS
from grpo_cli.record.metrics import read_metrics
from tests.integration.test_cli_train import (
    assert_same_weights,
    final_weights,
    grpo,
    numbers,
    start,
    wait_for_step,
)
from tests.processes import Command, run_ranks

pytestmark = pytest.mark.slow

WEIGHT_TOLERANCE = 1e-5
"""Of final weights, in float32, that optimizer steps move by 1e-3 each. Gradients are summed in another order, and
Adam, which divides by their size, makes the rounding of a tiny one visible."""

METRIC_TOLERANCE = 1e-5
"""Relative, and absolute below 1."""

LOGPROB_TOLERANCE = 1e-4
"""Of single tokens under weights that differ by so much."""

ROUNDED = ("advantage", "logprobs", POLICY_LOGPROBS)
"""Columns that are computed."""


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, so that there may be more processes than GPUs; except for tests of GPUs."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def write_recipe(model: Path, folder: Path) -> Path:
    """A recipe that is hard to split: five prompts of different lengths, completions that end anywhere, a KL,
    several optimizer steps and passes over each rollout, and packs that hold about one group."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{"question " * (1 + i % 4)}{i}:"}}\n' for i in range(12)))
    recipe = {
        "model": {"name": str(model)},
        "data": {"name": str(prompts)},
        "rewards": ["rewards.length:reward_len", "rewards.diversity:reward_num_unique_chars"],
        "generation": {"num_generations": 4, "max_completion_tokens": 12, "stop": ["a", "q"]},
        "loss": {"beta": 0.1},
        "optim": {"learning_rate": 1e-3},
        "train": {
            "output_dir": str(folder / "whole"), "max_steps": 3, "prompts_per_step": 5,
            "optimizer_steps_per_rollout": 2, "num_iterations": 2, "max_tokens_per_microbatch": 100,
        },
        "logging": {"trackers": []},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def recipe(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return write_recipe(tiny_model_dir, tmp_path)


@pytest.fixture(scope="module")
def one_process(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the recipe on one process."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        train(write_recipe(tiny_model_dir, folder), folder / "run", "none", 1)
    return folder / "run"


def train(recipe: Path, folder: Path, strategy: str, processes: int, *options: str) -> str:
    """Each rank as a launcher of the user's own would start it; `launch` is with our launcher."""
    if processes == 1:
        return launch(recipe, folder, strategy, processes, *options)
    codes, output = run_ranks(processes, *command(recipe, folder, strategy, processes), *options)
    assert codes == [0] * processes, output
    return output


def launch(recipe: Path, folder: Path, strategy: str, processes: int, *options: str) -> str:
    return grpo(*command(recipe, folder, strategy, processes), *options)


def command(recipe: Path, folder: Path, strategy: str, processes: int) -> list[str]:
    settings = (f"train.output_dir={folder}", f"distributed.strategy={strategy}")
    overrides = [part for setting in settings for part in ("--set", setting)]
    return ["train", str(recipe), *overrides, "--processes", str(processes)]


def completions(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "completions").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return [{name: value for name, value in row.items() if name not in ROUNDED} for row in rows]


def policy_logprobs(folder: Path) -> list[float | None]:
    files = sorted((folder / "completions").glob("*.parquet"))
    columns = [pq.read_table(file).column(POLICY_LOGPROBS).to_pylist() for file in files]
    return [value for column in columns for of_completion in column for value in of_completion]


def assert_same_run(one: Path, other: Path) -> None:
    """Prompts, completions and rewards exactly; what is computed of them to rounding."""
    assert completions(one) == completions(other)
    assert policy_logprobs(one) == pytest.approx(policy_logprobs(other), rel=0, abs=LOGPROB_TOLERANCE)
    for row, theirs in zip(numbers(one), numbers(other), strict=True):
        assert row == pytest.approx(theirs, rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE, nan_ok=True)
    assert_close_weights(one, other)


def assert_close_weights(one: Path, other: Path) -> None:
    theirs = final_weights(other)
    for name, weight in final_weights(one).items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=WEIGHT_TOLERANCE, msg=name)


SPLITS = {
    "ddp": (2, 4),
    "zero1": (1, 2, 4),
    "zero2": (1, 2, 4),
    "zero3": (1, 2, 4),
    "fsdp": (2,),
}


@pytest.mark.parametrize("strategy", SPLITS)
def test_the_split_does_not_matter(recipe: Path, one_process: Path, tmp_path: Path, strategy: str) -> None:
    lengths = {row["tokens"] for row in completions(one_process)}
    assert len(lengths) > 3, "completions are ragged"
    for processes in SPLITS[strategy]:
        folder = tmp_path / f"{strategy}-{processes}"
        train(recipe, folder, strategy, processes)
        assert_same_run(folder, one_process)


def test_our_launcher_starts_the_same_run(recipe: Path, one_process: Path, tmp_path: Path) -> None:
    launch(recipe, tmp_path / "launched", "ddp", 2)
    assert_same_run(tmp_path / "launched", one_process)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", SPLITS)
def test_the_split_does_not_matter_on_gpus(recipe: Path, tmp_path: Path, strategy: str) -> None:
    """In float32, and over one step: kernels add in another order, and a later step would sample other tokens."""
    options = ("--set", "train.max_steps=1", "--set", "model.compute_dtype=float32")
    launch(recipe, tmp_path / "one", "none", 1, *options)
    launch(recipe, tmp_path / "two", strategy, 2, *options)
    assert [row["completion"] for row in completions(tmp_path / "two")] == [
        row["completion"] for row in completions(tmp_path / "one")
    ]
    (one,), (two,) = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    for name in ("loss", "grad_norm", "reward"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_adapters_are_merged_from_their_parts(recipe: Path, tmp_path: Path, strategy: str) -> None:
    lora = ("--set", "model.lora.r=4", "--set", "model.lora.modules_to_save=[lm_head]", "--set", "loss.beta=0")
    train(recipe, tmp_path / "one", "none", 1, *lora)
    train(recipe, tmp_path / "two", strategy, 2, *lora)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_offloading_changes_nothing(recipe: Path, one_process: Path, tmp_path: Path, strategy: str) -> None:
    train(recipe, tmp_path / "two", strategy, 2, "--set", "distributed.cpu_offload=true")
    assert_same_run(tmp_path / "two", one_process)


def test_a_checkpoint_of_four_goes_on_with_two_and_with_one(recipe: Path, tmp_path: Path) -> None:
    options = ("--set", "optim.scheduler=constant", "--set", "train.save_every=1")  # more steps are added later
    train(recipe, tmp_path / "whole", "none", 1, *options, "--set", "train.max_steps=4")
    parts = tmp_path / "parts"
    train(recipe, parts, "zero3", 4, *options, "--set", "train.max_steps=2")
    written = sorted(path.name for path in (parts / "checkpoint-000002").glob("optimizer*"))
    assert written == [f"optimizer-{rank:05d}-of-00004.pt" for rank in range(4)]
    train(recipe, parts, "zero3", 2, *options, "--set", "train.max_steps=3", "--resume")
    train(recipe, parts, "none", 1, *options, "--set", "train.max_steps=4", "--resume")
    assert_same_run(parts, tmp_path / "whole")


@pytest.mark.parametrize(("strategy", "dtype"), [("zero2", "float32"), ("zero3", "bfloat16")])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bytes(
    recipe: Path, tmp_path: Path, strategy: str, dtype: str
) -> None:
    options = ("--set", "train.max_steps=6", "--set", f"model.dtype={dtype}")
    train(recipe, tmp_path / "whole", strategy, 2, *options)
    stopped = tmp_path / "stopped"
    process = start(*command(recipe, stopped, strategy, 2), *options)
    wait_for_step(stopped, 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert output.count("continue with --resume") == 1, output
    train(recipe, stopped, strategy, 2, *options, "--resume")
    assert numbers(stopped) == numbers(tmp_path / "whole")
    assert_same_weights(stopped, tmp_path / "whole")


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp"])
def test_more_steps_for_a_finished_run_follow_the_longer_schedule(
    recipe: Path, tmp_path: Path, strategy: str
) -> None:
    once = ("--set", "train.num_iterations=1", "--set", "train.optimizer_steps_per_rollout=1")
    folder = tmp_path / "run"
    train(recipe, folder, strategy, 2, *once, "--set", "train.max_steps=2")
    before = final_weights(folder)
    train(recipe, folder, strategy, 2, *once, "--set", "train.max_steps=3", "--resume")
    assert numbers(folder)[2]["learning_rate"] == pytest.approx(1e-3 / 3)
    moved = max((value - before[name]).abs().max().item() for name, value in final_weights(folder).items())
    assert moved > 1e-4, "the one step after the resume has that rate"


@pytest.fixture
def endless(recipe: Path, tmp_path: Path) -> Iterator[Command]:
    """A run on three processes that has trained for two steps."""
    folder = tmp_path / "endless"
    process = start(*command(recipe, folder, "zero2", 3), "--set", "train.max_steps=100000")
    wait_for_step(folder, 2, process)
    yield process
    process.kill()
    process.wait()


def workers(process: Command) -> dict[int, psutil.Process]:
    """The processes of a run, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child
    return found


def test_a_rank_that_dies_ends_the_run_and_is_named(endless: Command) -> None:
    ranks = workers(endless)
    assert sorted(ranks) == [0, 1, 2]
    killed = time.monotonic()
    ranks[1].kill()
    output, _ = endless.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert endless.returncode == 1, output
    last_lines = "\n".join(output.strip().splitlines()[-2:])
    assert "rank 1 " in last_lines, output
    assert "SIGKILL" in last_lines, output
    assert not psutil.wait_procs(ranks.values(), timeout=10)[1], "no worker is left"


def test_no_worker_outlives_its_launcher(endless: Command) -> None:
    ranks = workers(endless)
    endless.kill()
    assert not psutil.wait_procs(ranks.values(), timeout=50)[1], "no worker is left"


def test_what_one_rank_finds_wrong_is_told_once(recipe: Path, tmp_path: Path) -> None:
    """Rank 1 scores every second group where a function has workers, so it alone calls this one with those."""
    (tmp_path / "picky.py").write_text(
        "import os\n"
        "def picky(completions, **columns):\n"
        "    if os.environ.get('RANK') == '1':\n"
        "        raise ValueError('I do not like this')\n"
        "    return [0.0] * len(completions)\n"
    )
    picky = ("--set", "rewards=[{path: picky:picky, workers: 1}]")
    process = Command(*command(recipe, tmp_path / "run", "ddp", 2), *picky, folder=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert output.count("I do not like this") == 1, output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--set", "distributed.strategy=none", "--processes", "2"), "none is for one process"),
        (("--set", "distributed.deepspeed_config=missing.json", "--processes", "2"), "missing.json"),
        (("--set", "model.name=missing", "--processes", "2"), "cannot load the tokenizer of missing"),
        (
            (
                "--set",
                "distributed.cpu_offload=true",
            ),
            "set strategy",
        ),
    ],
)
def test_wrong_input_is_one_message(recipe: Path, options: tuple[str, ...], told: str) -> None:
    output = grpo("train", recipe, *options, code=2)
    assert output.count(told) == 1, output
    assert "Traceback" not in output
    assert not read_metrics_if_any(recipe.parent / "whole")


def read_metrics_if_any(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def test_deepspeed_settings_of_one_s_own(recipe: Path, one_process: Path, tmp_path: Path) -> None:
    own = tmp_path / "deepspeed.json"
    own.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "gradient_clipping": "auto"}')
    train(recipe, tmp_path / "two", "auto", 2, "--set", f"distributed.deepspeed_config={own}")
    assert_same_run(tmp_path / "two", one_process)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', "bf16.enabled contradicts model.dtype"),
        ('{"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}', "scheduler is the recipe"),
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 3.0}', "gradient_clipping is 3.0"),
    ],
)
def test_a_deepspeed_file_does_not_overrule_the_recipe(
    recipe: Path, tmp_path: Path, settings: str, told: str
) -> None:
    own = tmp_path / "deepspeed.json"
    own.write_text(settings)
    output = grpo("train", recipe, "--set", f"distributed.deepspeed_config={own}", code=2)
    assert output.count(told) == 1, output


def test_an_optimizer_that_looks_at_whole_matrices_is_refused_under_zero(recipe: Path) -> None:
    own = ("--set", "optim.name=torch.optim:Adafactor", "--set", "distributed.strategy=zero2")
    assert "Adafactor is not known" in grpo("train", recipe, *own, code=2)
