"""One `grpo serve` as the trainer sees it: every call has a timeout, and an error that names the server."""

from __future__ import annotations

import contextlib
import random
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import torch
from pydantic import ValidationError

from grpo_cli.errors import RunError, UserError
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server.attempts import LONGEST_PAUSE_S
from grpo_cli.rollout.server.weight_transfer import (
    SendingGroup,
    fill_memory,
    shares_memory,
)
from grpo_cli.serve import protocol, wire
from grpo_cli.serve.protocol import (
    BeginWeights,
    Body,
    Committed,
    CommitWeights,
    GenerateRequest,
    GenerateResponse,
    Refused,
    ServerInfo,
    Staging,
    Weights,
)
from grpo_cli.serve.sender import in_background

CONNECT_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 512

LAST_WORD_S = 5.0
"""Wait for the server's own account of a broadcast that failed on this side."""

Answer = TypeVar("Answer", bound=Body)


class ServerAway(Exception):
    """The server cannot be reached, broke off, or says that it is not well: it may come back."""


class LinkBroken(ServerAway):
    """Nothing is known of the server: no connection, silence, a broken answer, or a proxy without it."""


class NoRoom(RunError):
    """The server has no memory for weights that are handed over."""


class WrongWeights(Exception):
    """The server has other weights than the ones that are wanted, or none that are whole."""


class ServerConnection:
    """Speaks to one server.

    Args:
        url: base URL.
        key: sent with every request.
        timeout_s: longest silence of the server before it counts as away, and longest wait for it to come back.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.lock = threading.Lock()
        """Held while the server is sent weights or waited for."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # A connection that waits for its next request may be forgotten by what lies in between, which shows only
        # as silence. A new one costs little beside a generation.
        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=0)
        # No proxy from the environment: weights and key are for this server alone. Its certificate is checked
        # against the authorities of the system, or of SSL_CERT_FILE.
        self._http = httpx2.Client(
            base_url=url,
            headers=headers,
            limits=limits,
            verify=ssl.create_default_context(),
            trust_env=False,
        )
        self._group: SendingGroup | None = None

    def info(self) -> ServerInfo:
        """What the server says of itself.

        Raises:
            ServerAway, UserError, RunError: see `_call`.
        """
        return self._call(ServerInfo, "GET", protocol.INFO)

    def wait_until_ready(self, still_there: Callable[[], None] = lambda: None) -> ServerInfo:
        """Ask until the server answers.

        Args:
            still_there: called before each attempt; raises if there is no point in waiting.

        Raises:
            ServerAway: it did not within `timeout_s`.
        """
        deadline, pause = time.monotonic() + self.timeout_s, 0.1
        while True:
            still_there()
            try:
                return self.info()
            except ServerAway as error:
                if time.monotonic() + pause > deadline:
                    raise type(error)(f"{error}, and for {self.timeout_s:g} s before") from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Generate one group.

        Raises:
            WrongWeights: the server does not have `request.weights`.
            ServerAway: it broke off, or was interrupted.
            UserError, RunError: see `_call`.
        """
        response = self._call(GenerateResponse, "POST", protocol.GENERATE, request)
        if response.interrupted is not None:
            raise ServerAway(f"{self.url}: {response.interrupted}")
        if response.weights != request.weights and request.weights is not None:
            raise WrongWeights(f"{self.url} generated with {response.weights}")
        return response

    def send_weights(self, weights: Weights, policy: PolicyWeights) -> int:
        """Give the server the policy's weights under the name `weights`; return the bytes that were moved.

        Raises:
            ServerAway: it broke off; it generates nothing before it has got a whole set.
            RunError: what the server got is not what was sent.
        """
        info = self.info()
        specs = policy.specs(info.dtype)
        buckets = wire.plan_buckets(specs)
        begin = BeginWeights(weights=weights, tensors=specs)
        if shares_memory(info) and not self._can_use_nccl(info, policy):
            committed, digest = self._hand_over(begin, info, buckets, policy)
        else:
            committed, digest = self._broadcast(begin, info, buckets, policy)
        if committed.digest != digest or committed.weights != weights:
            raise RunError(
                f"{self.url} has got {committed.weights} with digest {committed.digest}, sent was {weights} "
                f"with {digest}"
            )
        return wire.total_bytes(buckets)

    def _hand_over(
        self, begin: BeginWeights, info: ServerInfo, buckets: list[wire.Bucket], policy: PolicyWeights
    ) -> tuple[Committed, str]:
        """Through memory that both see; by broadcast where there is not enough of it."""
        try:
            staging = self._call(Staging, "POST", protocol.BEGIN_WEIGHTS, begin)
        except NoRoom:
            return self._broadcast(begin, info, buckets, policy)
        expected = str(Path(info.memory_probe).with_name(protocol.STAGING_FILE))
        if staging.path != expected:
            raise RunError(f"{self.url} asks for the weights in {staging.path}, not {expected}: it is not trusted")
        try:
            digest = fill_memory(expected, buckets, policy)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # as torch reports a file that is not there
            raise ServerAway(f"{self.url} has taken its memory away: {error}") from error
        commit = CommitWeights(weights=begin.weights, digest=digest)
        return self._call(Committed, "POST", protocol.COMMIT_WEIGHTS, commit), digest

    def _can_use_nccl(self, info: ServerInfo, policy: PolicyWeights) -> bool:
        """Whether both sides compute on GPUs, and not on the same one, which NCCL refuses."""
        if "cpu" in info.devices or policy.device.type != "cuda":
            return False
        return str(torch.cuda.get_device_properties(policy.device).uuid) not in info.devices

    def _broadcast(
        self, begin: BeginWeights, info: ServerInfo, buckets: list[wire.Bucket], policy: PolicyWeights
    ) -> tuple[Committed, str]:
        backend = "nccl" if self._can_use_nccl(info, policy) else "gloo"
        try:
            if self._group is None or self._group.instance != info.instance:
                self._group = SendingGroup(self.url, backend, info, self.timeout_s)
        except OSError as error:
            raise LinkBroken(f"{self.url} cannot be reached: {error}") from error
        group = self._group
        rendezvous = begin.model_copy(update={"rendezvous": group.rendezvous})
        self._call(Staging, "POST", protocol.BEGIN_WEIGHTS, rendezvous)
        digest = group.start_sending(buckets, policy)
        commit = CommitWeights(weights=begin.weights)
        committed = in_background(partial(self._call, Committed, "POST", protocol.COMMIT_WEIGHTS, commit))
        try:
            return self._outcome(committed, digest)
        except Exception:
            self._group = None  # the workers have left it
            raise

    def _outcome(self, committed: Future[Committed], digest: Future[str]) -> tuple[Committed, str]:
        """The server's answer and what was sent, once both are there; the error of either at once.

        Raises:
            ServerAway: the transfer broke, which may be of the moment.
        """
        both: list[Future[Any]] = [digest, committed]
        wait(both, return_when=FIRST_EXCEPTION)
        failure = digest.exception() if digest.done() else None
        if failure is None:
            return committed.result(), digest.result()
        is_of_network = isinstance(failure, RuntimeError | OSError)  # torch.distributed raises the former
        if not is_of_network or isinstance(failure, torch.OutOfMemoryError):
            raise failure
        wait([committed], timeout=LAST_WORD_S)
        refusal = committed.exception() if committed.done() else None
        if refusal is not None and not isinstance(refusal, ServerAway):
            raise refusal
        kind = LinkBroken if refusal is None else type(refusal)  # a server that answers knows the cause
        raise kind(f"{refusal or self.url}; the trainer: {failure}") from failure

    def _call(self, answer: type[Answer], method: str, path: str, body: Body | None = None) -> Answer:
        """Send a request and read its answer.

        Raises:
            LinkBroken: no connection, silence, an answer that breaks off, or a status of a proxy.
            ServerAway: another status from 500.
            WrongWeights: status 409.
            UserError: the server wants a key, or another one.
            RunError: the server refuses the request, or is no `grpo serve` of this version.
        """
        content = None if body is None else body.model_dump_json()
        headers = {"Content-Type": "application/json"}
        # Whatever takes a server long, it says a blank now and then.
        silence = self.timeout_s if path == protocol.INFO else max(self.timeout_s, 2 * protocol.HEARTBEAT_S)
        timeout = httpx2.Timeout(silence, connect=min(CONNECT_TIMEOUT_S, self.timeout_s), pool=None)
        try:
            response = self._http.request(method, path, content=content, headers=headers, timeout=timeout)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            reason = ": ".join(filter(None, [type(error).__name__, str(error)]))
            raise LinkBroken(f"{self.url} does not answer ({reason})") from error
        status, detail = _refusal(response)
        if status == 401:
            raise UserError(
                f"{self.url} wants the key of its --api-key-file; set generation.server.api_key_file to that file"
            )
        if status == 409:
            raise WrongWeights(f"{self.url}: {detail}")
        if status == 507:
            raise NoRoom(f"{self.url}: {detail}")
        if status in (502, 504):
            raise LinkBroken(f"{self.url}: {detail}")
        if status >= 500:
            raise ServerAway(f"{self.url}: {detail}")
        if status != 200:
            raise RunError(f"{self.url}{path} answers {status}: {detail}")
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise RunError(f"{self.url} is no grpo serve of this version: {path} gives {detail}") from error

    def close(self) -> None:
        self._http.close()


def _refusal(response: httpx2.Response) -> tuple[int, str]:
    """The status that is meant, and the reason for it: a late one is in the body of an answer that began well."""
    if response.status_code == 200:
        with contextlib.suppress(ValidationError):
            refused = Refused.model_validate_json(response.content)
            return refused.status, refused.detail
    return response.status_code, _detail(response)


def _detail(response: httpx2.Response) -> str:
    """The reason in an error's body, in whichever of vLLM's and FastAPI's shapes it comes."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:300]
    for name in ("detail", "error", "message"):
        while isinstance(body, dict) and name in body:
            body = body[name]
    return str(body)[:500]
