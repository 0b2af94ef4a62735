"""What vLLM is told where the user says nothing: a CPU build to split no prompt, one for GPUs nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from grpo_cli.errors import UserError
from grpo_cli.serve import engine_arguments
from grpo_cli.serve.engine_arguments import SPLITTING, as_options, engine_defaults, most_sharing, refuse_splitting


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setattr(engine_arguments, "is_cpu_build", lambda: request.param == "cpu")
    return str(request.param)


on_cpu = pytest.mark.parametrize("build", ["cpu"], indirect=True)
on_gpu = pytest.mark.parametrize("build", ["cuda"], indirect=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, []),
        ({"max_model_len": 4096}, ["--max-model-len", "4096"]),
        (
            {"enforce_eager": True, "enable_prefix_caching": False},
            ["--enforce-eager", "--no-enable-prefix-caching"],
        ),
        ({"quantization": None}, []),
        ({"gpu_memory_utilization": 0.5, "dtype": "auto"}, ["--gpu-memory-utilization", "0.5", "--dtype", "auto"]),
        ({"hf_overrides": {"a": [1, None]}}, ["--hf-overrides", '{"a": [1, null]}']),
        ({"middleware": ["x", "y"]}, ["--middleware", '["x", "y"]']),
        ({"swap_space": 0}, ["--swap-space", "0"]),
    ],
)
def test_engine_arguments_become_options(arguments: dict[str, Any], expected: list[str]) -> None:
    assert as_options(arguments) == expected


@on_gpu
def test_on_a_gpu_vllm_s_own_defaults_hold_and_prompts_may_be_split(build: str) -> None:
    assert engine_defaults() == {}
    refuse_splitting(dict.fromkeys(SPLITTING, 1), str)


@on_cpu
def test_a_cpu_computes_in_float32_without_compiling_and_prompts_whole(build: str) -> None:
    assert engine_defaults() == {
        "dtype": "float32", "enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False
    }  # fmt: skip


@on_cpu
@pytest.mark.parametrize("name", [*SPLITTING, "enable-chunked-prefill"])
def test_what_splits_prompts_is_refused_on_a_cpu_as_the_user_wrote_it(build: str, name: str) -> None:
    with pytest.raises(UserError) as caught:
        refuse_splitting({"max_model_len": 64, name: 5}, "generation.vllm.{}".format)
    assert str(caught.value) == (
        f"generation.vllm.{name.replace('-', '_')}: on a CPU vLLM dies of a prompt that is computed in parts and "
        "sampled with a seed, as all of ours are; remove it"
    )
    refuse_splitting({name: 0, "max_num_batched_tokens": 512}, str)


@on_cpu
def test_vllm_makes_room_for_the_longest_prompt_and_refuses_less(build: str, vllm_model_dir: Any) -> None:
    """Its own rules, which the defaults rely on."""
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")

    def scheduler(**arguments: Any) -> Any:
        engine = arg_utils.EngineArgs(model=str(vllm_model_dir), **(engine_defaults() | arguments))
        return engine.create_engine_config().scheduler_config

    assert scheduler().enable_chunked_prefill is False
    assert scheduler(max_num_batched_tokens=512).max_num_batched_tokens == 512
    with pytest.raises(ValueError, match="smaller than max_model_len"):
        scheduler(max_num_batched_tokens=511)


def test_nothing_heavy_is_imported() -> None:
    heavy = ["torch", "vllm", "numpy", "transformers"]
    code = (
        f"import sys, grpo_cli.serve.engine_arguments; sys.exit(' '.join(sys.modules.keys() & set({heavy})) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_is_shared_by_as_many_gpus_as_divide_its_heads_and_its_mlp() -> None:
    shapes = {(14, 2, 4864): 2, (12, 2, 8960): 4, (28, 4, 18944): 4, (64, 8, 29568): 8, (9, 3, 1536): 3}
    assert {shape: most_sharing(8, *shape) for shape in shapes} == shapes
    assert most_sharing(0, 14, 2, 4864) == 1, "on a CPU"
    assert most_sharing(16, 64, 8, 29568) == 16, "vLLM repeats the heads of keys"
    assert most_sharing(8, 24, 24, 0) == 8, "of an MLP of unknown width only vLLM can tell"
