"""The recipe's rollout engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from grpo_cli.errors import UserError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.schema import Recipe
from grpo_cli.rollout.engine import RolloutEngine
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.rollout_server import RolloutServer
from grpo_cli.rollout.spawned_server import SpawnedServer
from grpo_cli.rollout.transformers_engine import TransformersEngine, eos_token_ids
from grpo_cli.rollout.vllm_client import VllmClient
from grpo_cli.serve.lock import read_key


def build_engine(
    recipe: Recipe,
    policy: PackedModel,
    tokenizer: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
    note: Callable[[str], None],
) -> RolloutEngine:
    """Make the engine that `generation.engine` names.

    Raises:
        UserError: it cannot be used with this model or on this machine.
    """
    generation = recipe.generation
    if generation.engine == "transformers":
        return TransformersEngine(policy, tokenizer, generation, autocast)
    weights, eos = PolicyWeights(policy.model), eos_token_ids(policy.model, tokenizer)
    if generation.engine == "vllm":
        from grpo_cli.rollout.vllm_engine import VllmEngine

        return VllmEngine(policy.model, weights, tokenizer, generation, eos)
    server = generation.server
    assert server is not None
    spawned, key = None, None
    if server.spawn:
        log = Path(recipe.train.output_dir).expanduser() / "server.log"
        note(f"starting a rollout server; its log is {log}")
        spawned = SpawnedServer(policy.model, tokenizer, server, generation.vllm, log)
        spawned.ensure_running()
        key = spawned.key
    elif server.api_key_file is not None:
        try:
            key = read_key(Path(server.api_key_file).expanduser())
        except UserError as error:
            raise UserError(f"generation.server.api_key_file: {error}") from error
    urls = [spawned.url] if spawned is not None else server.urls
    servers = [RolloutServer(url, key, server.timeout_s) for url in urls]
    return VllmClient(servers, weights, tokenizer, generation, eos, spawned=spawned, note=note)
