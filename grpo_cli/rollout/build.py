"""The recipe's rollout engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from grpo_cli.distributed.environment import placement
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import Strategy
from grpo_cli.errors import UserError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.schema import Recipe
from grpo_cli.rollout.embedded.engine import EmbeddedEngine, eos_token_ids
from grpo_cli.rollout.engine import RolloutEngine
from grpo_cli.rollout.over_ranks import LedEngine, SplitEngine
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server.engine import ServerEngine
from grpo_cli.rollout.server.connection import ServerConnection
from grpo_cli.rollout.server.spawned_server import SpawnedServer
from grpo_cli.serve.lock import read_key


def build_engine(
    recipe: Recipe,
    policy: PackedModel,
    tokenizer: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
    note: Callable[[str], None],
    ranks: Ranks,
    strategy: Strategy,
) -> RolloutEngine:
    """Make the engine that `generation.engine` names, for all ranks together.

    Raises:
        UserError: it cannot be used with this model or on this machine.
    """
    generation = recipe.generation
    if generation.engine == "transformers":
        own = EmbeddedEngine(policy, tokenizer, generation, autocast, note)
        is_alone = ranks.world_size == 1 and not strategy.shards_weights
        return own if is_alone else SplitEngine(own, ranks, strategy.whole_model)
    weights = PolicyWeights(policy.model, strategy, ranks.device)
    eos = eos_token_ids(policy.model, tokenizer)
    if generation.engine == "vllm" and ranks.world_size > 1:
        raise UserError(
            f"generation.engine: vllm is for one process, and {ranks.world_size} train; write vllm_server"
        )
    if generation.engine == "vllm":
        from grpo_cli.rollout.vllm.engine import VllmEngine

        return VllmEngine(policy.model, weights, tokenizer, generation, eos)
    made: list[ServerEngine] = []
    ranks.led(lambda: made.append(_client(recipe, policy, tokenizer, weights, eos, note)))
    return made[0] if ranks.world_size == 1 else LedEngine(made[0] if made else None, ranks, weights)


def _client(
    recipe: Recipe,
    policy: PackedModel,
    tokenizer: Any,
    weights: PolicyWeights,
    eos: set[int],
    note: Callable[[str], None],
) -> ServerEngine:
    generation, server = recipe.generation, recipe.generation.server
    assert server is not None
    spawned, key = None, None
    if server.spawn:
        log = Path(recipe.train.output_dir).expanduser() / "server.log"
        note(f"starting a rollout server; its log is {log}")
        local = placement(os.environ).local_world_size
        training = range(local) if local > 1 else [weights.device.index or 0]
        spawned = SpawnedServer(policy.model, tokenizer, server, generation.vllm, log, training=training)
        spawned.ensure_running()
        key = spawned.key
    elif server.api_key_file is not None:
        try:
            key = read_key(Path(server.api_key_file).expanduser())
        except UserError as error:
            raise UserError(f"generation.server.api_key_file: {error}") from error
    urls = [spawned.url] if spawned is not None else server.urls
    servers = [ServerConnection(url, key, server.timeout_s) for url in urls]
    return ServerEngine(servers, weights, tokenizer, generation, eos, spawned=spawned, note=note)
