"""The rollout engine that generates on one or several `grpo serve`."""

from __future__ import annotations

import queue
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from grpo_cli.distributed.outcome import outcome_of, result_of
from grpo_cli.errors import RunError, ServerLost, ServerNeverReached
from grpo_cli.recipe.sampling import Sampling
from grpo_cli.rollout.engine import Demand, OnTurn, SampledTurn, Turn, check_lengths
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server.attempts import Attempts
from grpo_cli.rollout.server.connection import LinkBroken, ServerAway, ServerConnection, WrongWeights
from grpo_cli.rollout.server.spawned_server import SpawnedServer
from grpo_cli.rollout.server.stream import Lane, ServerStream, daemon
from grpo_cli.rollout.with_vllm import sampled_turn, seed_of
from grpo_cli.serve.protocol import GenerateRequest, GenerateResponse, ServerInfo, Weights


class ServerEngine:
    """Generates on servers, which all have the weights of the same version.

    Args:
        servers: at least one.
        policy: what the servers are given.
        tokenizer: decodes completions.
        sampling: how tokens are drawn and where a completion ends.
        eos_token_ids: tokens that end a completion.
        spawned: the server that this engine starts and stops, if it is its own.
        note: told what the user should know while waiting.
    """

    def __init__(
        self,
        servers: Sequence[ServerConnection],
        policy: PolicyWeights,
        tokenizer: Any,
        sampling: Sampling,
        eos_token_ids: set[int],
        *,
        spawned: SpawnedServer | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.servers = list(servers)
        self.policy = policy
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.eos_token_ids = eos_token_ids
        self.spawned = spawned
        self.note = note
        self.run = secrets.token_hex(8)
        self.weights: Weights | None = None
        self._infos: dict[str, ServerInfo] = {}
        self._has_taken: set[str] = set()
        """Servers that have been sent weights."""
        self._told: set[str] = set()
        """Servers of whose failures the user was told since the last update."""

    def update_weights(self, version: int) -> int:
        """Give every server the policy's present weights; return the bytes that were moved.

        Raises:
            ServerLost: a server stayed away longer than `timeout_s`, or its link broke again and again; or this
                engine's own ended again and again.
            RunError: it answers, but does not take the weights.
            ServerNeverReached: it has not answered once, or no weights have reached it.
        """
        self.weights = Weights(run=self.run, version=version)
        self._told.clear()
        moved: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for server in self.servers:
            daemon(partial(self._update_one, server, moved))
        return sum(result_of(moved.get()) for _ in self.servers)

    def _update_one(self, server: ServerConnection, moved: queue.SimpleQueue[Any]) -> None:
        moved.put(outcome_of(partial(self._bring_up_to_date, server), (Exception,)))

    def _bring_up_to_date(self, server: ServerConnection) -> int:
        """Wait for a server if need be, and send the weights unless it has them; return the bytes moved."""
        assert self.weights is not None
        attempts = Attempts(server.timeout_s)
        with server.lock:
            while True:
                try:
                    info = self._wait(server)
                    self._infos[server.url] = info
                    moved = 0
                    if info.weights != self.weights or info.refusing is not None:
                        moved = server.send_weights(self.weights, self.policy)
                    self._has_taken.add(server.url)
                    return moved
                except (ServerAway, WrongWeights) as error:
                    self.note(f"{error}; sending the weights again")
                    # The server's own word on a transfer that has worked before tells of the link, too.
                    way_works = isinstance(error, ServerAway) and server.url in self._has_taken
                    if not attempts.failed(is_link=way_works or isinstance(error, LinkBroken)):
                        raise self._unsendable(server, attempts.count, error) from error

    def _unsendable(self, server: ServerConnection, count: int, reason: Exception) -> RunError:
        """Why a server that answers has not got the weights."""
        text = f"the weights could not be sent in {count} attempts: {reason}"
        if isinstance(reason, WrongWeights):
            return RunError(text)
        if server.url in self._has_taken:  # so it is neither the weights nor the way to send them
            return ServerLost(text)
        if isinstance(reason, LinkBroken):
            return ServerNeverReached(f"generation.server: {text}; the server must reach this machine, too")
        return RunError(text)

    def _wait(self, server: ServerConnection) -> ServerInfo:
        is_known = server.url in self._infos
        own = self.spawned
        if own is not None:
            own.ensure_running()
        # One that has answered before is started again if it ends; one that has not ends for a reason to be told.
        check = (own.ensure_running if is_known else own.check) if own is not None else lambda: None
        try:
            if own is None or is_known:
                try:
                    return server.info()
                except ServerAway:
                    self.note(f"waiting up to {server.timeout_s:g} s for {server.url}")
            return server.wait_until_ready(check)
        except ServerAway as error:
            if is_known:
                raise ServerLost(str(error)) from error
            hint = "is grpo serve running there?" if own is None else f"its log is {own.log}"
            raise ServerNeverReached(f"generation.server: {error}; {hint}") from error

    @contextmanager
    def stream(self, on_turn: OnTurn, demand: Demand) -> Iterator[ServerStream]:
        """See `TurnEngine.stream`. `update_weights` comes first.

        The outcome of a turn may be a ServerLost, as of `update_weights`, or a RunError: it fails every time.
        """
        assert self.weights is not None, "update_weights comes before stream"
        lanes = [Lane(server, self._infos[server.url].max_num_seqs) for server in self.servers]
        stream = ServerStream(lanes, self._send, on_turn, self._check_lengths)
        try:
            yield stream
        finally:
            stream.stop()

    def _send(self, server: ServerConnection, turns: Sequence[Turn]) -> list[SampledTurn]:
        request = generate_request(self.sampling, self.eos_token_ids, turns, self.weights)
        response = self._generate(server, request)
        return [sampled_turn(part, self.sampling, self.tokenizer) for part in response.completions]

    def _generate(self, server: ServerConnection, request: GenerateRequest) -> GenerateResponse:
        attempts = Attempts(server.timeout_s)
        while True:
            instance = self._infos[server.url].instance
            try:
                response = server.generate(request)
            except (ServerAway, WrongWeights) as error:
                if server.url not in self._told:
                    self._told.add(server.url)
                    self.note(f"{error}; asking again")
                self._bring_up_to_date(server)
                # One that has started anew may have ended of the prompt.
                is_link = isinstance(error, LinkBroken) and self._infos[server.url].instance == instance
                if not attempts.failed(is_link=is_link):
                    kind = ServerLost if is_link else RunError
                    raise kind(f"a prompt failed {attempts.count} times: {error}") from error
                continue
            if self.spawned is not None:
                self.spawned.has_generated()
            return response

    def _check_lengths(self, turns: Sequence[Turn]) -> None:
        for server in self.servers:
            limit = self._infos[server.url].max_model_len
            what_to_do = (
                f"the --max-model-len {limit} of {server.url}; raise it there, or lower data.max_prompt_tokens or "
                "generation.max_completion_tokens"
            )
            check_lengths(turns, limit, what_to_do)

    def release_memory(self) -> None:
        """Nothing: the servers have memory of their own."""

    def close(self) -> None:
        """Stop the server if it is this engine's own."""
        for server in self.servers:
            server.close()
        if self.spawned is not None:
            self.spawned.stop()


def generate_request(
    sampling: Sampling, eos_token_ids: set[int], turns: Sequence[Turn], weights: Weights | None = None
) -> GenerateRequest:
    """What a server is asked for turns that all begin alike: one, or the first ones of a group."""
    first = turns[0]
    settings = sampling.model_dump(include=set(Sampling.model_fields))
    return GenerateRequest(
        token_ids=list(first.token_ids),
        n=len(turns),
        seed=seed_of(first),
        stop_token_ids=sorted(eos_token_ids),
        weights=weights,
        **(settings | {"max_completion_tokens": first.max_tokens}),
    )
