"""Which of vLLM's arguments a recipe may hold: none that training sets, and none by which vLLM runs code by name.

Nothing in a recipe is executed but what its own keys name. vLLM imports what many of its arguments name, some deep
inside of nested ones, so that both their names and what looks like the path of an object are refused. Whoever runs
`grpo serve` may pass them. vLLM is not imported: a recipe is checked where it is not installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

RESERVED_VLLM_ARGUMENTS = {
    "model": "has a key of its own: model.name",
    "tokenizer": "has a key of its own: model.tokenizer",
    "tensor_parallel_size": "has a key of its own: generation.server.tensor_parallel_size",
    "api_key": "has a key of its own: generation.server.api_key_file",
    "host": "is not for the user to set: a spawned server listens on this machine alone; remove it",
    "port": "has a key of its own: generation.server.port",
} | dict.fromkeys(
    ("load_format", "logprobs_mode", "worker_extension_cls", "weight_transfer_config", "enable_sleep_mode",
     "distributed_executor_backend"),
    "is set by the engine, since training depends on it; remove it",
)  # fmt: skip
"""Engine arguments that are not the user's, and why."""

RUNS_CODE = (
    "names code for vLLM to run, and of a recipe nothing runs but what its own keys name; remove it, or start "
    "grpo serve with it and name that server in generation.server.urls"
)

NO_NAME = "is no name of an argument; write one word, such as max_model_len"

REMOTE_CODE = "runs the code that comes with a model; set model.trust_remote_code as well"

ARGUMENT = re.compile(r"[A-Za-z][\w-]*(\.[\w-]+)*", re.ASCII)
"""`compilation_config.level` is a word for an entry of a nested argument."""

CODE_NAME = re.compile(
    r"(.*_)?(cls|class|class_overrides|cls_path|plugins?|module|module_path|middleware|logits_processors|passes"
    r"|callback|auto_map|log_config_file|logging_config)"
)
"""Names of arguments, and of entries in nested ones, whose values vLLM imports or calls."""

CODE_VALUE = re.compile(r"[^\W\d]\w*([.:][^\W\d]\w*)+|.*\.py")
"""`module.name`, `module:name`, or a Python file."""

NAMES_NO_CODE = {
    "splitting_ops", "custom_ops", "offload_params", "cpu_offload_params", "kv_cache_dtype_skip_layers",
    "lora_target_modules", "sleep_preserve_parameter_names", "served_model_name", "master_addr",
    "data_parallel_address", "allowed_media_domains",
}  # fmt: skip
"""Arguments whose values may have dots: operators, parameters, layers and hosts."""


def refused_vllm_arguments(arguments: Mapping[str, Any], trust_remote_code: bool) -> Iterator[tuple[str, str]]:
    """Yield (name of an argument, why it may not stand in a recipe).

    Args:
        arguments: the recipe's `generation.vllm`.
        trust_remote_code: the recipe's `model.trust_remote_code`.
    """
    for name, value in arguments.items():
        first = name.replace("-", "_").partition(".")[0]
        if not ARGUMENT.fullmatch(name):
            yield name, NO_NAME
        elif first in RESERVED_VLLM_ARGUMENTS:
            yield name, RESERVED_VLLM_ARGUMENTS[first]
        elif _names_code(name, value):
            yield name, RUNS_CODE
        elif not trust_remote_code and _trusts(name, value):
            yield name, REMOTE_CODE


def _names_code(name: str, value: Any) -> bool:
    """Whether an argument, or an entry of a nested one, names code to be run."""
    last = name.replace("-", "_").rpartition(".")[2].casefold()
    value = _parsed(value)
    if last in NAMES_NO_CODE or value is None:
        return False
    if CODE_NAME.fullmatch(last):
        return True
    if isinstance(value, Mapping):
        return any(_names_code(str(key), entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return any(_names_code("", entry) for entry in value)
    return isinstance(value, str) and CODE_VALUE.fullmatch(value.strip()) is not None


def _trusts(name: str, value: Any) -> bool:
    value = _parsed(value)
    if isinstance(value, Mapping):
        return any(_trusts(str(key), entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return any(_trusts("", entry) for entry in value)
    return name.replace("-", "_").rpartition(".")[2] == "trust_remote_code" and value not in (False, None)


def _parsed(value: Any) -> Any:
    """What vLLM makes of a text that holds JSON."""
    if not isinstance(value, str) or value.strip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
