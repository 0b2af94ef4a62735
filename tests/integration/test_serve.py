"""`grpo serve` through the real command line: its lock, what it generates, weights that arrive and that do not."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import re
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from grpo_cli import cli
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server import connection
from grpo_cli.rollout.server.connection import ServerAway, ServerConnection, WrongWeights
from grpo_cli.rollout.server.weight_transfer import SendingGroup
from grpo_cli.serve import wire
from grpo_cli.serve.protocol import (
    BEGIN_WEIGHTS,
    COMMIT_WEIGHTS,
    GENERATE,
    INFO,
    BeginWeights,
    Committed,
    CommitWeights,
    Staging,
    Weights,
)
from tests.integration.serving import PROMPT, Serve, drift, generate, send_set, wait_until
from tests.processes import Command

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
"""Of log-probabilities against transformers; measured 1e-5."""

NATIVE_RL_ROUTES = {
    "/pause", "/resume", "/is_paused", "/collective_rpc", "/reset_prefix_cache", "/sleep", "/wake_up",
    "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update",
    "/update_weight_version", "/weight_info",
}  # fmt: skip


@pytest.fixture(scope="module")
def shared_server(vllm_model_dir: Path) -> Iterator[Serve]:
    server = Serve(vllm_model_dir, environment={"VLLM_SERVER_DEV_MODE": "1"})
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def server(shared_server: Serve) -> Serve:
    return shared_server.running()


@pytest.fixture(scope="module")
def start_model(vllm_model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(vllm_model_dir)


@pytest.fixture
def perturbed(start_model: Any, request: pytest.FixtureRequest) -> Any:
    """The model with other weights, different ones in each test."""
    return other_weights(start_model, request.node.name)


def other_weights(model: Any, name: str) -> Any:
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return changed


def weights_of(request: pytest.FixtureRequest, version: int = 1) -> Weights:
    return Weights(run=request.node.name[:60], version=version)


def assert_recovers(client: ServerConnection, model: Any, weights: Weights) -> None:
    """A whole set makes the server generate from it, and from nothing else."""
    client.send_weights(weights, PolicyWeights(model))
    assert client.info().refusing is None
    assert client.info().weights == weights
    assert drift(generate(client, weights), model) < TOLERANCE


def assert_refuses(server: Serve, weights: Weights, reason: str) -> None:
    """Neither our route nor vLLM's own generates, and both say why."""
    client = server.client()
    refusing = client.info().refusing
    assert refusing is not None
    assert reason in refusing
    for wanted in (None, weights):
        with pytest.raises(WrongWeights, match=re.escape(reason)):
            generate(client, wanted)
    with server.http(server.key()) as http:
        foreign = http.post("/v1/completions", json={"model": str(server.model), "prompt": "a", "max_tokens": 1})
    assert foreign.status_code == 503
    assert reason in foreign.text


# What it says of itself, and the lock


def test_ready_line_names_everything_but_the_key(server: Serve, vllm_model_dir: Path) -> None:
    (line,) = [line for line in server.output().splitlines() if line.startswith("ready: ")]
    for part in (server.url, str(vllm_model_dir), "weights version 0", str(server.key_file)):
        assert part in line
    assert stat.S_IMODE(server.key_file.stat().st_mode) == 0o600
    key = server.key()
    assert len(key) >= 32
    assert key not in server.output()
    processes = server.processes()
    assert len(processes) >= 3, "server, engine and worker"
    for process in processes:
        for name in ("cmdline", "environ"):
            assert key.encode() not in Path(f"/proc/{process.pid}/{name}").read_bytes()


def logged_routes(server: Serve) -> dict[str, set[str]]:
    """Paths and methods as vLLM lists them when it starts."""
    routes: dict[str, set[str]] = {}
    for path, methods in re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", server.output()):
        routes.setdefault(path, set()).update(methods.split(", "))
    return routes


def test_no_route_and_no_method_answers_without_the_key(server: Serve) -> None:
    routes = logged_routes(server)
    assert set(routes) >= NATIVE_RL_ROUTES | {INFO, GENERATE, BEGIN_WEIGHTS, COMMIT_WEIGHTS, "/v1/completions"}
    with server.http(server.key()) as http:
        assert set(http.get("/openapi.json").json()["paths"]) <= set(routes), "the log lists every route"
    everything = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
    paths = [re.sub(r"\{\w+\}", "x", path) for path in routes] + ["/", "/nothing", "/health/", "//health"]
    for key in (None, "x" * len(server.key()), server.key()[:-1], server.key() + "x"):
        with server.http(key) as http:
            for path in paths:
                for method in sorted(everything):
                    if (path, method) in (("/health", "GET"), ("/health", "HEAD")):
                        continue
                    answer = http.request(method, path)
                    assert answer.status_code == 401, f"{method} {path} with key {key}: {answer.status_code}"
            assert http.get("/health").status_code == 200
    with server.http() as http:
        for address in (f"/v1/models?api_key={server.key()}", f"{INFO}?token={server.key()}"):
            assert http.get(address).status_code == 401
        preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        answer = http.options(GENERATE, headers=preflight)
        assert answer.status_code == 401
        assert "access-control-allow-origin" not in answer.headers
    with server.http(server.key()) as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/is_paused").status_code == 200, "the routes that were refused are there"


@pytest.mark.parametrize("path", ["/", "/v1/realtime", INFO, "/health"])
@pytest.mark.parametrize("key", [None, "wrong-key-wrong-key"])
def test_websockets_are_refused_without_the_key(server: Serve, path: str, key: str | None) -> None:
    authorization = "" if key is None else f"Authorization: Bearer {key}\r\n"
    handshake = (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{authorization}"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(handshake.encode())
        status = connection.recv(4096).split(b"\r\n")[0]
    assert status.startswith((b"HTTP/1.1 401", b"HTTP/1.1 403")), status


# Generation


REQUEST = {"token_ids": PROMPT, "n": 1, "max_completion_tokens": 4}


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        ('{"token_ids": [1', 400, "JSON"),
        ("[]", 400, "body"),
        (REQUEST | {"tokens": [1]}, 400, "tokens"),
        (REQUEST | {"token_ids": []}, 400, "token_ids"),
        (REQUEST | {"token_ids": [1] * 510}, 400, "--max-model-len 512"),
        (REQUEST | {"token_ids": [5, 260]}, 400, "260 is not in the vocabulary"),
        (REQUEST | {"token_ids": [5, -1]}, 400, "token_ids"),
        (REQUEST | {"token_ids": "abc"}, 400, "token_ids"),
        (REQUEST | {"stop_token_ids": [999]}, 400, "stop_token_ids"),
        (REQUEST | {"n": 0}, 400, "body.n"),
        (REQUEST | {"n": 1.5}, 400, "body.n"),
        (REQUEST | {"max_completion_tokens": 0}, 400, "max_completion_tokens"),
        (REQUEST | {"temperature": -1}, 400, "temperature"),
        (REQUEST | {"top_p": 0}, 400, "top_p"),
        (REQUEST | {"seed": 2**70}, 400, "seed"),
        (REQUEST | {"weights": {"run": "another", "version": 9}}, 409, "version 9 of run another"),
        (REQUEST | {"weights": {"run": "another"}}, 400, "version"),
    ],
    ids=lambda value: None if isinstance(value, int) else json.dumps(value)[-40:],
)
def test_a_wrong_request_is_refused_by_name(server: Serve, body: Any, status: int, names: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    with server.http(server.key()) as http:
        answer = http.post(GENERATE, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert names in answer.text
    assert len(generate(server.client()).completions) == 4, "the server goes on"


def test_a_group_in_one_request_is_seeded_and_its_logprobs_are_the_models(
    server: Serve, perturbed: Any, request: pytest.FixtureRequest
) -> None:
    client, weights = server.client(), weights_of(request)
    client.send_weights(weights, PolicyWeights(perturbed))
    group = generate(client, weights, n=6, max_completion_tokens=24)
    assert group.weights == weights
    assert len({tuple(part.token_ids) for part in group.completions}) == 6
    assert all(len(part.token_ids) == 24 and part.finish_reason == "length" for part in group.completions)
    assert generate(client, weights, n=6, max_completion_tokens=24) == group
    assert generate(client, weights, n=6, max_completion_tokens=24, seed=100) != group
    third = generate(client, weights, n=1, max_completion_tokens=24, seed=9).completions[0]
    assert third.token_ids == group.completions[2].token_ids, "completion i is drawn with seed + i"
    for temperature in (0.7, 1.0, 1.5):
        assert drift(generate(client, weights, temperature=temperature), perturbed, temperature) < TOLERANCE


def test_the_end_of_a_completion_is_the_requests_business(server: Serve) -> None:
    client = server.client()
    tokens = generate(client, n=1, max_completion_tokens=24).completions[0].token_ids
    stopped = generate(client, n=1, max_completion_tokens=24, stop_token_ids=[tokens[5]]).completions[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == tokens[: tokens.index(tokens[5]) + 1]
    assert len(stopped.logprobs) == len(stopped.token_ids)


# Weights


def count_calls(client: ServerConnection, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    paths: list[str] = []
    send = client._http.request

    def counted(method: str, path: str, **rest: Any) -> Any:
        paths.append(path)
        return send(method, path, **rest)

    monkeypatch.setattr(client._http, "request", counted)
    return paths


@pytest.mark.parametrize("way", ["memory", "broadcast"])
def test_sent_weights_are_what_generates(
    server: Serve,
    start_model: Any,
    perturbed: Any,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    client = server.client()
    if way == "broadcast":
        monkeypatch.setattr("grpo_cli.rollout.server.connection.shares_memory", lambda info: False)
    client.send_weights(weights_of(request, 0), PolicyWeights(start_model))
    before = generate(client, weights_of(request, 0))
    assert drift(before, start_model) < TOLERANCE
    calls = count_calls(client, monkeypatch)
    moved = client.send_weights(weights_of(request, 1), PolicyWeights(perturbed))
    assert calls == [INFO, BEGIN_WEIGHTS, COMMIT_WEIGHTS]
    assert moved >= sum(parameter.numel() * 4 for parameter in perturbed.parameters())
    after = generate(client, weights_of(request, 1))
    assert drift(after, perturbed) < TOLERANCE
    assert drift(after, start_model) > 0.05
    with pytest.raises(WrongWeights, match="has version 1 of run"):
        generate(client, weights_of(request, 0))
    # A second set over what the first has made, be it a group or a file.
    assert_recovers(client, start_model, weights_of(request, 2))


def test_begin_without_commit_refuses_until_a_whole_set_comes(
    server: Serve, perturbed: Any, request: pytest.FixtureRequest
) -> None:
    client, weights, policy = server.client(), weights_of(request), PolicyWeights(perturbed)
    client._call(Staging, "POST", BEGIN_WEIGHTS, BeginWeights(weights=weights, tensors=policy.specs("float32")))
    assert_refuses(server, weights, f"{weights} of the weights is on its way")
    commit = CommitWeights(weights=weights_of(request, 9), digest="0" * wire.DIGEST_BYTES)
    with pytest.raises(WrongWeights, match="was not begun"):
        client._call(Committed, "POST", COMMIT_WEIGHTS, commit)
    assert_refuses(server, weights, "is on its way")
    assert_recovers(client, perturbed, weights)


def test_wrong_bytes_are_refused(server: Serve, perturbed: Any, request: pytest.FixtureRequest) -> None:
    client, weights, policy = server.client(), weights_of(request), PolicyWeights(perturbed)
    with pytest.raises(ServerAway, match="digest"):
        send_set(client, weights, policy, digest="0" * wire.DIGEST_BYTES)
    assert_refuses(server, weights, "did not arrive whole")
    assert_recovers(client, perturbed, weights)


PARTS_OF_LAYERS = {
    "model.embed_tokens.weight": "model.embed_tokens",
    "model.norm.weight": "model.norm",
    "lm_head.weight": "lm_head",
    "model.layers.0.input_layernorm.weight": "model.layers.0.input_layernorm",
    "model.layers.1.post_attention_layernorm.weight": "model.layers.1.post_attention_layernorm",
    "model.layers.1.self_attn.q_proj.weight": "model.layers.1.self_attn.qkv_proj",
    "model.layers.1.self_attn.k_proj.weight": "model.layers.1.self_attn.qkv_proj",
    "model.layers.0.self_attn.v_proj.weight": "model.layers.0.self_attn.qkv_proj",
    "model.layers.0.self_attn.o_proj.weight": "model.layers.0.self_attn.o_proj",
    "model.layers.1.mlp.gate_proj.weight": "model.layers.1.mlp.gate_up_proj",
    "model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.gate_up_proj",
    "model.layers.1.mlp.down_proj.weight": "model.layers.1.mlp.down_proj",
}
"""Tensors of a checkpoint, and the layer of vLLM that each belongs to."""


@pytest.mark.parametrize("missing", PARTS_OF_LAYERS)
def test_a_set_without_one_tensor_is_refused_by_the_layers_name(
    server: Serve, start_model: Any, missing: str, request: pytest.FixtureRequest
) -> None:
    client, weights = server.client(), Weights(run=missing, version=1)
    broken, whole = (other_weights(start_model, f"{missing} {part}") for part in ("broken", "whole"))
    with pytest.raises(ServerAway, match=re.escape(PARTS_OF_LAYERS[missing])):
        send_set(client, weights, PolicyWeights(broken), leave_out=missing)
    assert_refuses(server, weights, PARTS_OF_LAYERS[missing])
    assert_recovers(client, whole, weights)


def dying_trainer() -> None:
    """Sends weights by broadcasts until it has sent as many as an argument says.

    Then it is killed: its connections close, or a child of it holds all but those of its store, as if the network
    had lost them. The child's process id is printed.
    """
    from transformers import AutoModelForCausalLM

    url, key_file, model, last, silently = sys.argv[1:]
    sent, broadcast, ports, begin = [], wire.broadcast, [], SendingGroup.start_sending

    def begin_noted(group: Any, *rest: Any) -> Any:
        ports.append(group.rendezvous.port)
        return begin(group, *rest)

    def dying(group: Any, flat: torch.Tensor) -> None:
        if len(sent) == int(last):
            if silently and not os.fork():
                close_connections(ports[0])
                print("left", os.getpid(), flush=True)
                time.sleep(120)
                os._exit(0)
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        sent.append(flat)
        broadcast(group, flat)

    wire.broadcast, SendingGroup.start_sending = dying, begin_noted  # type: ignore[method-assign]
    connection.shares_memory = lambda info: False
    policy = PolicyWeights(AutoModelForCausalLM.from_pretrained(model))
    ServerConnection(url, Path(key_file).read_text().strip(), 60).send_weights(DYING, policy)


def close_connections(port: int) -> None:
    """Close what listens at a port in this process, and what has come in there."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = socket.socket(fileno=os.dup(int(name)))
    internet = {number: s for number, s in found.items() if s.family in (socket.AF_INET, socket.AF_INET6)}
    for number, one in internet.items():
        if one.getsockname()[1] == port:
            os.close(number)
    for one in found.values():
        one.close()


DYING = Weights(run="dying", version=1)


@pytest.mark.parametrize("silently", ["", "silently"], ids=["with its connections", "silently"])
@pytest.mark.parametrize("last", [0, 1], ids=["before the tensors", "before the digest"])
def test_a_trainer_that_dies_in_a_broadcast_leaves_a_server_that_refuses(
    server: Serve, perturbed: Any, vllm_model_dir: Path, last: int, silently: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [server.url, server.key_file, vllm_model_dir, str(last), silently]
    trainer = Command(*arguments, environment=server.environment, main=dying_trainer)
    output, _ = trainer.communicate(timeout=120)
    assert trainer.returncode == -signal.SIGKILL, output
    client = server.client()
    try:
        wait_until(lambda: "did not arrive whole" in (client.info().refusing or ""), 30)
        assert_refuses(server, DYING, "has gone in the middle of it" if silently else "did not arrive whole")
    finally:
        for pid in re.findall(r"^left (\d+)$", trainer.printed()[0], re.MULTILINE):
            os.kill(int(pid), signal.SIGKILL)
    assert_recovers(client, perturbed, Weights(run="next", version=1))
    monkeypatch.setattr("grpo_cli.rollout.server.connection.shares_memory", lambda info: False)
    assert_recovers(client, other_weights(perturbed, "again"), Weights(run="next", version=2))


# Ends


def wait_gone(processes: list[psutil.Process], timeout_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not [process.name() for process in alive if process.is_running()]


def wrong_serves() -> None:
    """`grpo serve` with each of several command lines, in one process, which imports vLLM once."""
    for arguments in json.loads(sys.argv[1]):
        sys.argv[1:] = ["serve", *arguments]
        try:
            cli.main()
        except SystemExit as stop:
            print(f"ended with {stop.code}", file=sys.stderr, flush=True)


def test_wrong_options_end_with_one_message(server: Serve, vllm_model_dir: Path, tmp_path: Path) -> None:
    model = ["--model", str(vllm_model_dir)]
    cases = {
        "no such model": (["--model", str(tmp_path / "nothing")], str(tmp_path / "nothing")),
        "port in use": ([*model, "--port", str(server.port)], f"127.0.0.1:{server.port}"),
        "unknown option": ([*model, "--no-such-option", "3"], "--no-such-option"),
        "key on the command line": ([*model, "--api-key", "secret-secret-secret"], "--api-key-file"),
    }
    # Where LD_PRELOAD is set, it does not start itself again for the sake of faster generation.
    environment = server.environment | {"LD_PRELOAD": ""}
    lines = json.dumps([arguments for arguments, _ in cases.values()])
    output, _ = Command(lines, environment=environment, main=wrong_serves).communicate(timeout=120)
    *outputs, rest = output.split("ended with 2\n")
    assert not rest
    for (name, (_, told)), printed in zip(cases.items(), outputs, strict=True):
        assert "Traceback" not in printed, f"{name}: {printed}"
        assert told in printed.splitlines()[-1], f"{name}: {printed}"
        assert "secret-secret" not in printed


def test_the_engines_death_ends_the_server_with_code_1_and_a_reason(server: Serve) -> None:
    processes = server.processes()
    server.engine().kill()
    assert server.process.wait(timeout=30) == 1
    wait_gone(processes, 15)
    own = [line for line in server.output().splitlines() if line.startswith("grpo serve: ")]
    assert "the engine died" in own[-1]
    assert "Traceback" not in server.output().split(own[-1])[1]


def test_an_open_address_has_a_key_of_its_own_and_a_killed_server_leaves_no_process(
    vllm_model_dir: Path, tmp_path: Path
) -> None:
    environment = {"HOME": str(tmp_path)}
    open_server = Serve(vllm_model_dir, "--host", "0.0.0.0", environment=environment, locked=False)
    memory = tmp_path / "nothing"
    try:
        open_server.wait_ready()
        key_file = tmp_path / ".config" / "grpo" / "server-key"
        assert str(key_file) in open_server.output()
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        with open_server.http() as http:
            assert http.get("/v1/models").status_code == 401
            assert http.get(INFO).status_code == 401
        with open_server.http(key_file.read_text().strip()) as http:
            memory = Path(http.get(INFO).json()["memory_probe"]).parent
        processes = open_server.processes()
        open_server.process.kill()
        wait_gone(processes, 15)
    finally:
        open_server.stop()
        shutil.rmtree(memory, ignore_errors=True)
