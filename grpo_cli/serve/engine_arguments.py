"""vLLM's engine arguments: those that training or a CPU build needs, and how a command line has them. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from grpo_cli.errors import UserError
from grpo_cli.serve.environment import is_cpu_build

HOW_TO_INSTALL = "pip install 'grpo-cli[vllm]' on a machine with a GPU, make vllm without one"

REQUIRED = {
    "worker_extension_cls": "grpo_cli.serve.worker.WeightReceiver",
    "weight_transfer_config": {"backend": "grpo"},
    "logprobs_mode": "processed_logprobs",
}
"""What training depends on, whatever else vLLM is told."""

SHARED_GPU_MEMORY = 0.3
"""Share of a GPU's memory that vLLM takes where the policy trains on the same one."""

CPU_DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,  # compiling takes minutes and gains little here
    "block_size": 32,  # with blocks of 128 a short prompt would not be shared
    "enable_chunked_prefill": False,  # vLLM then makes room for the longest prompt in one step
}

SPLITTING = ("enable_chunked_prefill", "long_prefill_token_threshold")
"""With one of these a prompt may be computed in several steps. vLLM discards what it samples before the last step,
and rewinds the generator of a seeded request by a method that a CPU's generator lacks: there the engine dies."""


def engine_defaults() -> dict[str, Any]:
    """What vLLM is told unless the user says otherwise."""
    return dict(CPU_DEFAULTS) if is_cpu_build() else {}


def refuse_splitting(arguments: Mapping[str, Any], spelled: Callable[[str], str]) -> None:
    """Raise UserError if a CPU build is asked to compute prompts in parts.

    Args:
        arguments: vLLM's engine arguments, as the user gave them.
        spelled: where the user writes one of that name.
    """
    values = {name.replace("-", "_"): value for name, value in arguments.items()}
    for name in SPLITTING:
        if is_cpu_build() and values.get(name):
            raise UserError(
                f"{spelled(name)}: on a CPU vLLM dies of a prompt that is computed in parts and sampled with a "
                "seed, as all of ours are; remove it"
            )


def can_share(gpus: int, heads: int, kv_heads: int, intermediate: int) -> bool:
    """Whether vLLM can split so many heads and so wide an MLP over `gpus`; it repeats heads of keys."""
    splits_kv_heads = kv_heads % gpus == 0 or gpus % kv_heads == 0
    return heads % gpus == 0 and splits_kv_heads and intermediate % gpus == 0


def most_sharing(gpus: int, heads: int, kv_heads: int, intermediate: int) -> int:
    """The most of `gpus` that can share the model; at least one."""
    return max(n for n in range(1, max(gpus, 1) + 1) if can_share(n, heads, kv_heads, intermediate))


def as_options(arguments: Mapping[str, Any]) -> list[str]:
    """`{max_model_len: 4096, enforce_eager: true}` as a command line; None is left out."""
    options: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            options.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            options += [flag, _as_text(value)]
    return options


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
