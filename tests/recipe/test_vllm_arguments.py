"""A recipe cannot have vLLM run code, whichever argument names it; what names none is vLLM's to judge."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.recipe.vllm_arguments import (
    NO_NAME,
    REMOTE_CODE,
    RESERVED_VLLM_ARGUMENTS,
    RUNS_CODE,
    refused_vllm_arguments,
)

RUN_CODE: list[dict[str, Any]] = [
    {"worker_cls": "evil.Worker"},
    {"worker-cls": "evil.Worker"},
    {"scheduler_cls": "evil:Scheduler"},
    {"logits_processors": ["evil"]},
    {"logits_processors": ["evil:Processor"]},
    {"middleware": ["evil.app"]},
    {"io_processor_plugin": "evil"},
    {"reasoning_parser_plugin": "/tmp/evil.py"},
    {"tool-parser-plugin": "evil.py"},
    {"model_class_overrides": {"LlamaForCausalLM": "evil:Llama"}},
    {"log_config_file": "/tmp/evil.json"},
    {"kv_transfer_config": {"kv_connector": "Evil", "kv_connector_module_path": "evil"}},
    {"kv_transfer_config": {"kv_connector_extra_config": {"spec_name": "S", "spec_module_path": "evil"}}},
    {"kv_transfer_config": {"kv_connector_extra_config": {"eviction": "evil.Policy"}}},
    {"kv_transfer_config": json.dumps({"kv_connector_module_path": "evil"})},
    {"kv_transfer_config.kv_connector_module_path": "evil"},
    {"ec_transfer_config": {"ec_connector_module_path": "evil"}},
    {"ec_manager_config": {"encoder_cache_manager_cls": "evil.Manager"}},
    {"structured_outputs_config": {"reasoning_parser_plugin": "evil"}},
    {"compilation_config": {"backend": "evil.backend"}},
    {"compilation_config": {"inductor_passes": {"x": "evil"}}},
    {"compilation_config.backend": "evil.backend"},
    {"speculative_config": {"method": "custom_class", "model": "evil.Proposer"}},
    {"hf_overrides": {"auto_map": {"AutoConfig": "evil"}}},
    {"unheard_of": [{"deep": {"inside": ["evil.touch"]}}]},
]


@pytest.mark.parametrize("arguments", RUN_CODE, ids=json.dumps)
def test_an_argument_that_names_code_is_refused(arguments: dict[str, Any]) -> None:
    assert list(refused_vllm_arguments(arguments, True)) == [(*arguments, RUNS_CODE)]


@pytest.mark.parametrize(
    "name", ["worker_cls=evil.Worker", "x --worker-cls", "-O3", "--worker-cls", "", "a.b+", "worker_cls\n", "ä"]
)
def test_what_is_no_name_cannot_smuggle_another_option_in(name: str) -> None:
    assert list(refused_vllm_arguments({name: True}, True)) == [(name, NO_NAME)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"trust_remote_code": True},
        {"trust-remote-code": "yes"},
        {"speculative_config": {"trust_remote_code": True}},
    ],
)
def test_the_code_of_a_model_runs_only_if_the_model_s_own_key_allows_it(arguments: dict[str, Any]) -> None:
    assert list(refused_vllm_arguments(arguments, False)) == [(*arguments, REMOTE_CODE)]
    assert list(refused_vllm_arguments(arguments, True)) == []


def test_what_names_no_code_is_vllm_s_to_judge() -> None:
    arguments = {
        "max_model_len": 4096, "gpu_memory_utilization": 0.5, "enforce_eager": True, "dtype": "bfloat16",
        "kv-cache-dtype": "fp8_e4m3", "attention_backend": "FLASH_ATTN", "quantization": "fp8", "revision": "v1.0",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "model": "Qwen/Qwen2.5-0.5B"},
        "compilation_config": {"level": 3, "custom_ops": ["+rms_norm"], "splitting_ops": ["vllm.attention"]},
        "hf_overrides": {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "trust_remote_code": False,
        "served_model_name": "my.model", "worker_cls": None, "override_generation_config": "{not json",
    }  # fmt: skip
    assert list(refused_vllm_arguments(arguments, False)) == []


def test_each_argument_of_the_installed_vllm_that_looks_like_code_is_refused() -> None:
    """By its name alone; whoever upgrades vLLM reads the new ones."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed")
    root = Path(spec.origin).parent
    fields = set()
    for path in [
        root / "engine/arg_utils.py",
        root / "entrypoints/launchers/cli_args.py",
        *(root / "config").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                fields |= {
                    line.target.id
                    for line in node.body
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                }
    telling = {
        name
        for name in fields
        if re.search("_cls$|_class$|plugin|middleware|module_path|logits_proc|_passes$", name)
    }
    assert {"worker_cls", "kv_connector_module_path", "middleware", "logits_processors"} <= telling
    refused = {name for name in telling if list(refused_vllm_arguments({name: "evil"}, True))}
    assert telling - refused - RESERVED_VLLM_ARGUMENTS.keys() == set()
