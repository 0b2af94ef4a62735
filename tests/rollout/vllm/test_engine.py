"""What vLLM in the training process is told; what it does then is for tests/integration."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.vllm.engine import VllmEngine
from grpo_cli.serve import engine_arguments
from tests.conftest import byte_tokenizer, tiny_llama


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of `vllm.LLM`, which computes nothing."""
    arguments: dict[str, Any] = {}

    class Llm:
        def __init__(self, **given: Any) -> None:
            arguments.update(given)

        def sleep(self, level: int) -> None:
            pass

    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setattr(sys.modules["vllm"], "LLM", Llm, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return arguments


def make(device: torch.device | None = None, **arguments: Any) -> VllmEngine:
    model = tiny_llama()
    weights = PolicyWeights(model, device=device)
    return VllmEngine(model, weights, byte_tokenizer(), GenerationConfig(vllm=arguments), {256})


@pytest.mark.parametrize("is_cpu_build", [False, True])
def test_a_cpu_build_is_told_what_a_server_is_told(
    told: dict[str, Any], is_cpu_build: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_arguments, "is_cpu_build", lambda: is_cpu_build)
    make(block_size=16)
    expected = engine_arguments.CPU_DEFAULTS | {"block_size": 16} if is_cpu_build else {"block_size": 16}
    assert {name: told[name] for name in engine_arguments.CPU_DEFAULTS if name in told} == expected


def test_an_argument_that_splits_prompts_is_refused_by_its_key(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_arguments, "is_cpu_build", lambda: True)
    with pytest.raises(UserError, match=r"^generation\.vllm\.long_prefill_token_threshold: "):
        make(long_prefill_token_threshold=64)
    assert told == {}


@pytest.mark.parametrize(("index", "expected"), [(0, None), (1, [1])])
def test_vllm_generates_on_the_gpu_that_the_policy_trains_on(
    told: dict[str, Any], index: int, expected: list[int] | None
) -> None:
    make(torch.device("cuda", index))
    assert told.get("device_ids") == expected
    assert told["enable_sleep_mode"]
