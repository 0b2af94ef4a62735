"""Memory that runs out is one message: where, what the plan counts, which settings would fit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import grpo_cli
from grpo_cli.errors import RunError
from grpo_cli.plan import nvidia
from grpo_cli.recipe.load import load_recipe
from grpo_cli.train import guards, out_of_memory
from grpo_cli.train.guards import explained_failures
from grpo_cli.train.learner import Learner

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "card_gib", lambda: 24.0)


def told(recipe: Any, error: BaseException) -> str:
    with pytest.raises(RunError) as caught, explained_failures(recipe):
        raise error
    return str(caught.value)


def gsm8k(*overrides: str) -> Any:
    return load_recipe("recipes/gsm8k.yaml", list(overrides))


@pytest.mark.usefixtures("card")
def test_a_full_gpu_names_settings_with_what_they_need_of_it() -> None:
    said = told(gsm8k(), torch.OutOfMemoryError(FULL))
    first, *lines, last = said.splitlines()
    assert first.startswith("the GPU is out of memory: the plan counts ")
    assert first.endswith("; by the plan any of these fits:")
    assert lines
    assert all(" -> " in line and line.endswith(" GiB of 24.0") for line in lines)
    assert last == f"({FULL})"


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("backward", "during training: "),
        ("step", "during the optimizer step: "),
        ("to_device", "during training: "),
    ],
)
def test_a_run_whose_gpu_is_full_says_in_which_phase(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str, where: str
) -> None:
    whole = getattr(Learner, method)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(FULL)

    # The code's own place, as a traceback has it, with a device that is full.
    code = full.__code__.replace(co_filename=whole.__code__.co_filename, co_name=method)
    monkeypatch.setattr(Learner, method, type(full)(code, globals()))
    with pytest.raises(RunError) as caught:
        grpo_cli.train(tiny_recipe, console=Console(quiet=True))
    assert str(caught.value).startswith(f"the GPU is out of memory {where}the plan counts ")


@pytest.mark.usefixtures("card")
def test_a_gpu_that_is_full_while_it_generates_says_so(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpo_cli.rollout.embedded import batch

    monkeypatch.setattr(batch, "torch", _FullTorch())
    with pytest.raises(RunError, match="the GPU is out of memory during generation: the plan counts"):
        grpo_cli.train(tiny_recipe, console=Console(quiet=True))


class _FullTorch:
    """Raises for whatever is asked of torch."""

    def __getattr__(self, name: str) -> Any:
        raise torch.OutOfMemoryError(FULL)


@pytest.mark.usefixtures("card")
def test_what_the_cuda_libraries_say_of_a_full_gpu_counts_too() -> None:
    for words in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
    ):
        assert told(gsm8k(), RuntimeError(words)).startswith("the GPU is out of memory: the plan counts")


@pytest.mark.usefixtures("card")
def test_a_model_that_the_plan_does_not_know_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    said = told(gsm8k(f"model.name={tmp_path}"), torch.OutOfMemoryError(FULL))
    assert "the plan cannot count what would fit (" in said
    assert "generation.max_completion_tokens (now 512)" in said


@pytest.mark.usefixtures("card")
def test_the_processes_that_the_run_has_are_the_ones_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "distributed.strategy: ddp -> zero" in told(gsm8k(), torch.OutOfMemoryError(FULL))


def test_a_full_machine_says_that_the_plan_does_not_count_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.int8)
    for error in (caught.value, MemoryError("no more")):
        said = told(gsm8k(), error)
        assert said.startswith("the machine is out of memory: of its ")
        assert "cannot say what would fit: lower train.max_tokens_per_microbatch (now automatic)" in said
        assert str(error)[:20] in said


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"), explained_failures(gsm8k()):
        raise RuntimeError("shapes do not match")


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_begins_with_a_warning(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch uses the GPU")
    monkeypatch.setattr(nvidia, "gpu_memory", lambda: 80.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tiny_recipe["train"]["max_steps"] = 1
    file = io.StringIO()
    grpo_cli.train(tiny_recipe, console=Console(file=file, width=80))
    assert file.getvalue().startswith("WARNING: this machine has an NVIDIA GPU, but ")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("the driver is too old")))
    file = io.StringIO()
    guards.warn_of_idle_gpu(Console(file=file, width=80))
    assert "built with CUDA 13.0, cannot use it (the driver is too old)" in file.getvalue()
