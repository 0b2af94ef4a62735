"""The rollout engine that generates on one or several `grpo serve`."""

from __future__ import annotations

import math
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpo_cli.distributed.outcome import outcome_of, result_of
from grpo_cli.errors import RunError, ServerLost, ServerNeverReached
from grpo_cli.recipe.sampling import Sampling
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey, check_lengths
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server.attempts import Attempts
from grpo_cli.rollout.server.connection import LinkBroken, ServerAway, ServerConnection, WrongWeights
from grpo_cli.rollout.server.spawned_server import SpawnedServer
from grpo_cli.rollout.with_vllm import completion, seed_of
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

    def update_weights(self, version: int) -> int:
        """Give every server the policy's present weights; return the bytes that were moved.

        Raises:
            ServerLost: a server stayed away longer than `timeout_s`, or its link broke again and again; or this
                engine's own ended again and again.
            RunError: it answers, but does not take the weights.
            ServerNeverReached: it has not answered once, or no weights have reached it.
        """
        self.weights = Weights(run=self.run, version=version)
        moved: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for server in self.servers:
            _daemon(partial(self._update_one, server, moved))
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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. `update_weights` comes first.

        Raises:
            UserError: a prompt is longer than the servers take.
            ServerLost: as `update_weights`.
            RunError: a prompt fails every time, while the link is well.
        """
        assert self.weights is not None, "update_weights comes before generate"
        self._check_lengths(prompts)
        requests = [
            generate_request(self.sampling, self.eos_token_ids, prompt, key, num_generations, self.weights)
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        work = _Work(requests)
        self._start_threads(work, num_generations)
        groups: list[list[Completion]] = [[] for _ in prompts]
        try:
            for _ in requests:
                index, outcome = work.outcomes.get()
                response = result_of(outcome)
                groups[index] = [completion(part, self.sampling, self.tokenizer) for part in response.completions]
                if on_group is not None:
                    on_group(index, groups[index])
        finally:
            work.stopped.set()
        return groups

    def _start_threads(self, work: _Work, num_generations: int) -> None:
        """Each server takes as many prompts at a time as it can hold, and another one whenever one is done."""
        share = math.ceil(len(work.requests) / len(self.servers))
        for server in self.servers:
            room = max(1, self._infos[server.url].max_num_seqs // num_generations)
            for _ in range(min(room, share)):
                _daemon(partial(self._take_work, server, work))

    def _take_work(self, server: ServerConnection, work: _Work) -> None:
        while not work.stopped.is_set():
            try:
                index = work.waiting.get_nowait()
            except queue.Empty:
                return
            outcome = outcome_of(partial(self._generate, server, work, work.requests[index]), (Exception,))
            work.outcomes.put((index, outcome))
            if isinstance(outcome, Exception):
                return

    def _generate(self, server: ServerConnection, work: _Work, request: GenerateRequest) -> GenerateResponse:
        attempts = Attempts(server.timeout_s)
        while True:
            instance = self._infos[server.url].instance
            try:
                response = server.generate(request)
            except (ServerAway, WrongWeights) as error:
                if work.stopped.is_set():
                    raise  # nobody waits for it any more
                if server.url not in work.told:
                    work.told.add(server.url)
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

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        for server in self.servers:
            limit = self._infos[server.url].max_model_len
            what_to_do = (
                f"the --max-model-len {limit} of {server.url}; raise it there, or lower data.max_prompt_tokens or "
                "generation.max_completion_tokens"
            )
            check_lengths(prompts, self.sampling.max_completion_tokens, limit, what_to_do)

    def release_memory(self) -> None:
        """Nothing: the servers have memory of their own."""

    def close(self) -> None:
        """Stop the server if it is this engine's own."""
        for server in self.servers:
            server.close()
        if self.spawned is not None:
            self.spawned.stop()


def generate_request(
    sampling: Sampling,
    eos_token_ids: set[int],
    prompt: Sequence[int],
    key: SampleKey,
    num_generations: int,
    weights: Weights | None = None,
) -> GenerateRequest:
    """What a server is asked for one prompt's group."""
    return GenerateRequest(
        token_ids=list(prompt),
        n=num_generations,
        seed=seed_of(key),
        stop_token_ids=sorted(eos_token_ids),
        weights=weights,
        **sampling.model_dump(include=set(Sampling.model_fields)),
    )


def _daemon(target: Callable[[], None]) -> None:
    """Run in a thread that does not keep an ending process alive, as one that waits for a hung server would."""
    threading.Thread(target=target, daemon=True).start()


@dataclass
class _Work:
    """The prompts of one call, which threads take from and report to."""

    requests: list[GenerateRequest]
    waiting: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)
    outcomes: queue.SimpleQueue[tuple[int, GenerateResponse | Exception]] = field(
        default_factory=queue.SimpleQueue
    )
    stopped: threading.Event = field(default_factory=threading.Event)
    told: set[str] = field(default_factory=set)
    """Servers whose failures the user was told of."""

    def __post_init__(self) -> None:
        for index in range(len(self.requests)):
            self.waiting.put(index)
