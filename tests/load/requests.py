"""The kinds of requests of the load, each with the status that it must be answered with.

A request is built when it is sent, since it names the weights of that moment; everything else of it follows from
its random numbers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo_cli.serve.protocol import BEGIN_WEIGHTS, COMMIT_WEIGHTS, GENERATE, INFO, Weights
from tests.load.wire import as_json, request_bytes

VOCABULARY = 260
MAX_MODEL_LEN = 1024
COMPLETIONS = "/v1/completions"
MIB = 2**20

_SHARED = list(range(40, 84))
PROMPTS = [[*_SHARED, 90 + i, *range(i, i + 5 * (i % 4))] for i in range(12)]
"""They begin alike and are longer than a block of the cache: what old weights made would be found there."""


@dataclass(frozen=True)
class Sampled:
    """What a request asks to be sampled, as far as its content can be checked."""

    prompt: tuple[int, ...]
    n: int
    max_tokens: int
    temperature: float
    names_weights: bool
    """Whether it asks for one version; a request of vLLM's own takes what is there."""
    streams: bool = False


@dataclass(frozen=True)
class Request:
    raw: bytes
    statuses: frozenset[int]
    """Any of them is right; those of an update that is on its way come on top."""
    sampled: Sampled | None = None
    head: int = 0
    """Bytes of `raw` before the body."""

    @property
    def has_body(self) -> bool:
        return self.head < len(self.raw)


@dataclass(frozen=True)
class Target:
    """The server, and what its state is when a request is built."""

    model: str
    key: str
    weights: Weights


Build = Callable[[random.Random, Target], Request]
MakeBody = Callable[[random.Random, Target], bytes]


@dataclass(frozen=True)
class Kind:
    build: Build
    share: float
    """Of all requests, in relation to the other kinds'."""
    is_good: bool


def bearer(target: Target) -> dict[str, str]:
    return {"Authorization": f"Bearer {target.key}"}


def _request(
    rng: random.Random, method: str, path: str, headers: Mapping[str, str], body: bytes | None, *statuses: int
) -> Request:
    raw = request_bytes(method, path, headers, body, closes=rng.random() < 0.3)
    return Request(raw, frozenset(statuses), head=len(raw) - len(body or b""))


def _generate_body(rng: random.Random, target: Target) -> dict[str, Any]:
    return {
        "token_ids": rng.choice(PROMPTS),
        "n": rng.randint(1, 4),
        "max_completion_tokens": rng.randint(4, 10),
        "temperature": rng.choice([0.7, 1.0]),
        "seed": rng.getrandbits(62),
        "weights": target.weights.model_dump(),
    }


def _generate(**changes: Any) -> Build:
    def build(rng: random.Random, target: Target) -> Request:
        body = _generate_body(rng, target) | changes
        sampled = Sampled(
            tuple(body["token_ids"]), body["n"], body["max_completion_tokens"], body["temperature"], True
        )
        return replace(_request(rng, "POST", GENERATE, bearer(target), as_json(body), 200), sampled=sampled)

    return build


def _completions(streams: bool) -> Build:
    def build(rng: random.Random, target: Target) -> Request:
        sampled = Sampled(tuple(rng.choice(PROMPTS)), rng.randint(1, 2), rng.randint(4, 8), 1.0, False, streams)
        body = {
            "model": target.model, "prompt": list(sampled.prompt), "n": sampled.n, "stream": streams,
            "max_tokens": sampled.max_tokens, "temperature": sampled.temperature, "seed": rng.getrandbits(31),
            "ignore_eos": True, "logprobs": 0, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        return replace(_request(rng, "POST", COMPLETIONS, bearer(target), as_json(body), 200), sampled=sampled)

    return build


def _get(path: str) -> Build:
    return lambda rng, target: _request(rng, "GET", path, bearer(target), None, 200)


def _refused(
    status: int,
    body: Callable[[random.Random, Target], bytes | None] = lambda rng, target: as_json(
        _generate_body(rng, target)
    ),
    method: str = "POST",
    path: str = GENERATE,
    headers: Callable[[Target], Mapping[str, str]] = bearer,
) -> Build:
    return lambda rng, target: _request(rng, method, path, headers(target), body(rng, target), status)


def _with(**changes: Any) -> MakeBody:
    """A good body but for this."""
    return lambda rng, target: as_json(_generate_body(rng, target) | changes)


def _text(text: str) -> MakeBody:
    return lambda rng, target: text.encode()


def _wrong_text(rng: random.Random, target: Target) -> bytes:
    return rng.choice([
        b"", b"{", b"null", b'"text"', b"[" * 50_000, b'{"token_ids": [1}', b"\xff\xfe{}",
        b'{"n": ' + b"9" * 5000 + b"}",
        as_json(_generate_body(rng, target))[:-1], b'{"token_ids": [1], "n": NaN}',
    ])  # fmt: skip


def _wrong_value(rng: random.Random, target: Target) -> bytes:
    changes = rng.choice([
        {"token_ids": "abc"}, {"token_ids": [1.5]}, {"token_ids": []}, {"token_ids": None}, {"n": 0}, {"n": "2"},
        {"n": 10**9}, {"max_completion_tokens": -1}, {"temperature": -1}, {"temperature": 1e308}, {"top_p": 2},
        {"seed": 2**70}, {"stop": [""]}, {"stop": ["\ud800"]}, {"unknown": 1}, {"weights": {"run": "x"}},
        {"weights": []}, {"stop_token_ids": [999]}, {"token_ids": [5, VOCABULARY]}, {"token_ids": [5, -1]},
        {"token_ids": [7] * MAX_MODEL_LEN}, {"max_completion_tokens": MAX_MODEL_LEN}, {"token_ids": [2**62]},
    ])  # fmt: skip
    return as_json(_generate_body(rng, target) | changes)


def _wrong_version(rng: random.Random, target: Target) -> bytes:
    run, version = target.weights.run, target.weights.version
    wanted = rng.choice([(run, max(version - 1, 0)), (run, version + 1000), ("another", version)])
    if wanted == (run, version):
        wanted = ("another", version)
    return _with(weights={"run": wanted[0], "version": wanted[1]})(rng, target)


def _wrong_completion(rng: random.Random, target: Target) -> bytes:
    body = {"model": target.model, "prompt": [1, 2, 3], "max_tokens": 2}
    changes = rng.choice([
        {"prompt": [VOCABULARY + 5]}, {"max_tokens": -1}, {"n": 0}, {"prompt": [1] * (MAX_MODEL_LEN + 1)},
        {"temperature": "hot"}, {"prompt": {}},
    ])  # fmt: skip
    return as_json(body | changes)


def _wrong_weights(rng: random.Random, target: Target) -> bytes:
    """Of a transfer that cannot begin; it must not stop generation."""
    spec = {"name": "w", "dtype": "float32", "shape": [2]}
    return rng.choice([
        as_json({"weights": target.weights.model_dump(), "tensors": []}),
        as_json({"weights": target.weights.model_dump(), "tensors": [spec | {"dtype": "pickle"}]}),
        as_json({"weights": target.weights.model_dump(), "tensors": [spec | {"shape": [-1]}]}),
        as_json({"weights": None, "tensors": [spec]}),
        b"{",
    ])  # fmt: skip


def _wrong_http(rng: random.Random, target: Target) -> Request:
    raw = rng.choice([
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not TLS here\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"GET /health HTTP/1.1\r\nbad header line\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * (2 * MIB) + b"\r\n\r\n",
        b"POST /v1/grpo/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nAuthorization: Bearer "
        + target.key.encode() + b"\r\n\r\nzz\r\n\r\n",
    ])  # fmt: skip
    return Request(raw, frozenset({400, 431}), head=len(raw))


def _no_key(rng: random.Random, target: Target) -> Mapping[str, str]:
    values = [
        "",
        target.key,
        f"Basic {target.key}",
        f"Bearer {target.key}x",
        f"Bearer {target.key[:-1]}",
        "Bearer ",
    ]
    value = rng.choice(values)
    return {"Authorization": value} if value else {}


def _unlocked(rng: random.Random, target: Target) -> Request:
    path = rng.choice([GENERATE, BEGIN_WEIGHTS, COMMIT_WEIGHTS, COMPLETIONS, INFO, "/metrics", "/nothing"])
    return _request(rng, "POST", path, _no_key(rng, target), as_json(_generate_body(rng, target)), 401)


def _huge(headers: Callable[[Target], Mapping[str, str]], status: int) -> Build:
    def body(rng: random.Random, target: Target) -> bytes:
        return b'{"token_ids": [' + b"40, " * (10 * MIB) + b"40]}"

    return _refused(status, body, headers=headers)


KINDS: Mapping[str, Kind] = {
    "generate": Kind(_generate(), 40, True),
    "generate, 400 tokens": Kind(_generate(max_completion_tokens=400, n=1), 0.4, True),
    "generate, 32 completions of 64": Kind(_generate(max_completion_tokens=64, n=32), 0.4, True),
    "info": Kind(_get(INFO), 5, True),
    "metrics, models, health": Kind(
        lambda rng, target: _get(rng.choice(["/metrics", "/v1/models", "/health"]))(rng, target), 3, True
    ),
    "vLLM's completions": Kind(_completions(False), 10, True),
    "vLLM's completions, streamed": Kind(_completions(True), 6, True),
    "no key or a wrong one": Kind(_unlocked, 5, False),
    "no JSON": Kind(_refused(400, _wrong_text), 4, False),
    "a wrong value": Kind(_refused(400, _wrong_value), 8, False),
    "another version": Kind(_refused(409, _wrong_version), 4, False),
    "commit without begin": Kind(
        _refused(409, _text(json.dumps({"weights": {"run": "another", "version": 1}})), path=COMMIT_WEIGHTS),
        1,
        False,
    ),
    "wrong weights": Kind(_refused(400, _wrong_weights, path=BEGIN_WEIGHTS), 2, False),
    "a wrong completion": Kind(_refused(400, _wrong_completion, path=COMPLETIONS), 3, False),
    "unknown model": Kind(_refused(404, _text('{"model": "x", "prompt": "a"}'), path=COMPLETIONS), 1, False),
    "unknown route": Kind(_refused(404, path="/v1/grpo/nothing"), 2, False),
    "wrong method": Kind(_refused(405, method="DELETE"), 2, False),
    "no HTTP": Kind(_wrong_http, 2, False),
    "40 MiB": Kind(_huge(bearer, 413), 0.3, False),
    "40 MiB without the key": Kind(_huge(lambda target: {}, 401), 0.3, False),
}
