"""What training processes and rollout servers send each other in a step, in bytes: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_cli.plan.memory import SERVER_BYTES
from grpo_cli.plan.setup import Setup, prompt_tokens
from grpo_cli.recipe.schema import Recipe

NETWORK, NVLINK = 25e9, 300e9
"""Bytes a second that one node's network and one GPU's NVLink carry. Assumptions, and printed as such."""


@dataclass(frozen=True)
class Work:
    """What one training process does in a step, at most."""

    tokens: int
    """Tokens of its groups, each prompt counted once for each pack that it is in."""
    packs: int
    """Forward and backward passes."""
    optimizer_steps: int


def work_of(recipe: Recipe, setup: Setup) -> Work:
    """The step of the process that has most groups, with the longest prompts and completions."""
    train, generation = recipe.train, recipe.generation
    prompt, answer = prompt_tokens(recipe), generation.max_completion_tokens
    group = prompt + generation.num_generations * answer
    groups = math.ceil(train.prompts_per_step / train.optimizer_steps_per_rollout / setup.processes)
    if group <= setup.pack_tokens:
        packs = math.ceil(groups / (setup.pack_tokens // group))
        tokens = groups * group
    else:  # a group is split, and its prompt computed once for each part
        packs = groups * math.ceil(generation.num_generations / max(1, (setup.pack_tokens - prompt) // answer))
        tokens = groups * generation.num_generations * answer + packs * prompt
    steps = train.optimizer_steps_per_rollout * train.num_iterations
    return Work(steps * tokens, steps * packs, steps)


def sharing_bytes(setup: Setup, parameters: int, trained: int, work: Work) -> float:
    """Bytes that pass through each GPU in a step, so that all have the same weights.

    In a ring of n, a gather or a scatter of B bytes moves (n-1)/n B through each member; a sum that all receive
    moves twice that. `ddp` and `zero1` sum gradients once for each optimizer step, `zero2` for each pack; `zero1`
    and `zero2` gather the updated weights. `zero3` and `fsdp` gather the weights for a pack's forward pass, again
    for its backward pass, and scatter its gradients.
    """
    ring, traits = (setup.processes - 1) / setup.processes, setup.traits
    weights, gradients = parameters * setup.weight_bytes, trained * setup.weight_bytes
    if traits.for_one_process:
        moved = 0
    elif traits.shards_weights:
        moved = work.packs * (2 * weights + gradients)
    elif traits.shards_gradients:
        moved = (work.packs * 2 + work.optimizer_steps) * gradients
    else:
        moved = work.optimizer_steps * (3 if traits.shards_optimizer else 2) * gradients
    return ring * moved


def update_bytes(parameters: int) -> int:
    """Bytes that each rollout server is sent before a step."""
    return parameters * SERVER_BYTES


def traffic_rows(recipe: Recipe, setup: Setup, parameters: int, trained: int) -> list[tuple[str, str]]:
    """The rows of `grpo check`."""
    rows = []
    if setup.processes > 1:
        work = work_of(recipe, setup)
        moved = sharing_bytes(setup, parameters, trained, work)
        passes = f"{work.packs} pack{'s' * (work.packs > 1)} of up to {setup.pack_tokens} tokens"
        rows.append(("sharing", f"{_gb(moved)} through each GPU in a step of {passes}: {_seconds(moved)}"))
    if setup.engine == "vllm_server":
        sent = update_bytes(parameters)
        rows.append(("update", f"{_gb(sent)} of bfloat16 weights to each server before a step: {_seconds(sent)}"))
    return rows


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _seconds(count: float) -> str:
    return f"{count / NETWORK:.1f} s at 25 GB/s (a node's network), {count / NVLINK:.1f} s at 300 GB/s (NVLink)"
