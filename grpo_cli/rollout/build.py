"""The recipe's rollout engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_cli.distributed.environment import placement
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import Strategy
from grpo_cli.errors import UserError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.schema import Recipe
from grpo_cli.rollout.embedded.engine import EmbeddedEngine, eos_token_ids
from grpo_cli.rollout.engine import RolloutEngine, TurnEngine
from grpo_cli.rollout.over_ranks import LedEngine, SplitEngine
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.replay import ReplayEngine
from grpo_cli.rollout.server.connection import ServerConnection
from grpo_cli.rollout.server.engine import ServerEngine
from grpo_cli.rollout.server.spawned_server import SpawnedServer
from grpo_cli.serve.lock import read_key


@dataclass(frozen=True)
class EngineParts:
    """What an engine is made from."""

    recipe: Recipe
    policy: PackedModel
    tokenizer: Any
    autocast: Callable[[], AbstractContextManager[Any]]
    note: Callable[[str], None]
    ranks: Ranks
    strategy: Strategy
    drive: Callable[[TurnEngine], RolloutEngine]
    """Makes whole completions of an engine's turns."""

    def weights(self) -> PolicyWeights:
        """For an engine that must be given the policy's weights."""
        return PolicyWeights(self.policy.model, self.strategy, self.ranks.device)


def build_engine(parts: EngineParts) -> RolloutEngine:
    """Make the engine that `generation.engine` names, for all ranks together.

    Raises:
        UserError: it cannot be used with this model or on this machine.
    """
    return ENGINES[parts.recipe.generation.engine](parts)


def _embedded(parts: EngineParts) -> RolloutEngine:
    ranks, strategy = parts.ranks, parts.strategy
    generation = parts.recipe.generation
    own = parts.drive(EmbeddedEngine(parts.policy, parts.tokenizer, generation, parts.autocast, parts.note))
    is_alone = ranks.world_size == 1 and not strategy.shards_weights
    return own if is_alone else SplitEngine(own, ranks, strategy.whole_model)


def _vllm(parts: EngineParts) -> RolloutEngine:
    from grpo_cli.rollout.vllm.engine import VllmEngine

    count, model, tokenizer = parts.ranks.world_size, parts.policy.model, parts.tokenizer
    if count > 1:
        raise UserError(f"generation.engine: vllm is for one process, and {count} train; write vllm_server")
    eos = eos_token_ids(model, tokenizer)
    return parts.drive(VllmEngine(model, parts.weights(), tokenizer, parts.recipe.generation, eos))


def _over_servers(parts: EngineParts) -> RolloutEngine:
    ranks, weights = parts.ranks, parts.weights()
    made: list[RolloutEngine] = []
    ranks.led(lambda: made.append(parts.drive(_connected(parts, weights))))
    return made[0] if ranks.world_size == 1 else LedEngine(made[0] if made else None, ranks, weights)


def _connected(parts: EngineParts, weights: PolicyWeights) -> ServerEngine:
    """The engine of rank 0, with a server of its own if the recipe wants one started."""
    model, tokenizer, note = parts.policy.model, parts.tokenizer, parts.note
    generation, server = parts.recipe.generation, parts.recipe.generation.server
    assert server is not None
    spawned, key, urls = None, None, server.urls
    if server.spawn:
        log = Path(parts.recipe.train.output_dir).expanduser() / "server.log"
        note(f"starting a rollout server; its log is {log}")
        local = placement(os.environ).local_world_size
        training = range(local) if local > 1 else [weights.device.index or 0]
        spawned = SpawnedServer(model, tokenizer, server, generation.vllm, log, training=training)
        spawned.ensure_running()
        key, urls = spawned.key, [spawned.url]
    elif server.api_key_file is not None:
        try:
            key = read_key(Path(server.api_key_file).expanduser())
        except UserError as error:
            raise UserError(f"generation.server.api_key_file: {error}") from error
    servers = [ServerConnection(url, key, server.timeout_s) for url in urls]
    eos = eos_token_ids(model, tokenizer)
    return ServerEngine(servers, weights, tokenizer, generation, eos, spawned=spawned, note=note)


def _replay(parts: EngineParts) -> RolloutEngine:
    folder = parts.recipe.generation.replay
    assert folder is not None
    stored = ReplayEngine(Path(folder).expanduser(), parts.recipe.train.max_steps or 1)
    return stored if parts.ranks.world_size == 1 else SplitEngine(stored, parts.ranks, nullcontext)


ENGINES: dict[str, Callable[[EngineParts], RolloutEngine]] = {
    "transformers": _embedded,
    "vllm": _vllm,
    "vllm_server": _over_servers,
    "replay": _replay,
}
"""What makes the engine of each name that `generation.engine` may have."""
