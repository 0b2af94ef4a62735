"""What cannot be generated is refused with a reason, and nothing comes from weights that were not meant."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI, HTTPException, WebSocket
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from grpo_cli.serve import protocol, routes
from grpo_cli.serve.protocol import GenerateResponse, ServerInfo, Weights
from grpo_cli.serve.routes import Gate, grpo_routes

PATIENCE_S = 20.0
LOADED = Weights(run="run", version=4)
BODY = {"token_ids": [1, 2, 3], "n": 2, "max_completion_tokens": 5, "seed": 7, "weights": LOADED.model_dump()}
TENSORS = [{"name": "w", "dtype": "float32", "shape": [2]}]


def part(index: int, reason: str = "stop", versions: tuple[str, ...] = ("run:4",)) -> Any:
    """One completion of two tokens, as vLLM gives it."""
    tokens = [index, 10 + index]
    return SimpleNamespace(
        index=index,
        token_ids=tuple(tokens),
        logprobs=[{token: SimpleNamespace(logprob=-token / 10)} for token in tokens],
        finish_reason=reason,
        weight_versions=[SimpleNamespace(version=version) for version in versions] or None,
    )


class Engine:
    """AsyncLLM as the routes see it."""

    errored = False

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(dtype="torch.bfloat16", max_model_len=16, get_vocab_size=lambda: 100)
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=32),
            parallel_config=SimpleNamespace(world_size_across_dp=2),
        )
        self.parts = [part(0), part(1, "length")]
        self.requests: list[tuple[Any, Any, str]] = []
        self.asked = 0
        """Times that the engine was asked whether it is there."""
        self.answers_needed = 0
        """Generation ends when it was asked so often."""
        self.enough = asyncio.Event()
        self.error: Exception | None = None
        self.is_cancelled = False

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.requests.append((prompt, params, request_id))
        try:
            if self.answers_needed:
                await asyncio.wait_for(self.enough.wait(), PATIENCE_S)
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        yield SimpleNamespace(outputs=self.parts)

    async def is_paused(self) -> bool:
        if self.error is not None:
            raise self.error
        self.asked += 1
        if self.asked == self.answers_needed:
            self.enough.set()
        return False


class Store:
    """The state of the weights, set by hand."""

    def __init__(self) -> None:
        self.is_drained = False
        self.weights: Weights | None = LOADED
        self.refusing: str | None = None
        self.instance, self.probe, self.devices = "instance", "/memory/instance", ["GPU-1", "GPU-2"]
        self.taken: list[Any] = []
        self.takes_s = 0.0
        self.refusal: HTTPException | None = None

    async def begin(self, request: Any) -> Any:
        await self._take(request)
        return protocol.Staging(path="/memory/weights")

    async def _take(self, request: Any) -> None:
        await asyncio.sleep(self.takes_s)
        self.taken.append(request)
        if self.refusal is not None:
            raise self.refusal

    async def commit(self, request: Any) -> Any:
        await self._take(request)
        return protocol.Committed(weights=request.weights, digest="d")


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def app(engine: Engine, store: Store) -> Any:
    """Our routes and some like vLLM's own, behind the gate."""
    app = FastAPI()
    app.include_router(grpo_routes(engine, store))  # type: ignore[arg-type]
    app.add_api_route("/v1/completions", lambda: "text", methods=["POST"])
    app.add_api_route("/v1/models", lambda: "models", methods=["GET", "HEAD"])

    @app.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    return Gate(app, store)  # type: ignore[arg-type]


@pytest.fixture
def client(app: Any) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def test_the_server_says_what_it_is(client: TestClient, store: Store) -> None:
    info = ServerInfo.model_validate_json(client.get(protocol.INFO).content)
    assert info == ServerInfo(
        instance="instance", weights=LOADED, refusing=None, dtype="bfloat16", max_model_len=16,
        max_num_seqs=32, world_size=2, devices=["GPU-1", "GPU-2"],
        memory_probe="/memory/instance",
    )  # fmt: skip
    store.weights, store.refusing = None, "no weights yet"
    info = ServerInfo.model_validate_json(client.get(protocol.INFO).content)
    assert (info.weights, info.refusing) == (None, "no weights yet")


def test_a_group_is_generated_from_tokens(client: TestClient, engine: Engine) -> None:
    answer = client.post(protocol.GENERATE, json=BODY | {"temperature": 0.5, "top_k": 3, "stop_token_ids": [9]})
    assert answer.status_code == 200
    response = GenerateResponse.model_validate_json(answer.content)
    assert response.weights == LOADED
    assert response.interrupted is None
    assert [one.token_ids for one in response.completions] == [[0, 10], [1, 11]]
    assert [one.logprobs for one in response.completions] == [[0.0, -1.0], [-0.1, -1.1]]
    assert [one.finish_reason for one in response.completions] == ["stop", "length"]
    ((prompt, params, _),) = engine.requests
    assert prompt == {"prompt_token_ids": [1, 2, 3]}
    assert (params.n, params.seed, params.max_tokens, params.temperature, params.top_k) == (2, 7, 5, 0.5, 3)
    assert params.stop_token_ids == [9]
    assert params.ignore_eos, "what ends a completion is the trainer's business"
    assert params.logprobs == 0, "that of the sampled token alone"


def test_each_request_has_a_name_of_its_own(client: TestClient, engine: Engine) -> None:
    for _ in range(3):
        client.post(protocol.GENERATE, json=BODY)
    assert len({name for _, _, name in engine.requests}) == 3


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        (
            {"max_completion_tokens": 14},
            400,
            "and max_completion_tokens 14 exceed the server's --max-model-len 16",
        ),
        ({"token_ids": [1, 100]}, 400, "token_ids: 100 is not in the vocabulary of 100"),
        ({"stop_token_ids": [5, 200]}, 400, "stop_token_ids: 200 is not in the vocabulary"),
        ({"weights": {"run": "run", "version": 5}}, 409, "has version 4 of run run, not version 5 of run run"),
        ({"weights": {"run": "other", "version": 4}}, 409, "not version 4 of run other"),
        ({"n": 0}, 422, "greater than or equal to 1"),
        ({"top_kk": 1}, 422, "top_kk"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_refused_with_a_reason(
    client: TestClient, engine: Engine, changes: dict[str, Any], status: int, reason: str
) -> None:
    answer = client.post(protocol.GENERATE, json=BODY | changes)
    assert answer.status_code == status
    assert reason in answer.text
    assert engine.requests == []


def test_the_longest_request_that_fits_is_taken(client: TestClient) -> None:
    assert client.post(protocol.GENERATE, json=BODY | {"max_completion_tokens": 13}).status_code == 200
    assert client.post(protocol.GENERATE, json=BODY | {"token_ids": [99]}).status_code == 200


def test_weights_that_are_not_there_do_not_generate(client: TestClient, engine: Engine, store: Store) -> None:
    store.weights = None
    answer = client.post(protocol.GENERATE, json=BODY)
    assert answer.status_code == 409
    assert "has what the server was started with, not version 4" in answer.json()["detail"]
    store.weights, store.refusing = LOADED, "on its way"
    for weights in (BODY["weights"], None):
        answer = client.post(protocol.GENERATE, json=BODY | {"weights": weights})
        assert (answer.status_code, answer.json()["detail"]) == (409, "on its way")
    assert engine.requests == []


def test_who_names_no_weights_gets_those_that_are_loaded(client: TestClient, store: Store, engine: Engine) -> None:
    answer = GenerateResponse.model_validate_json(
        client.post(protocol.GENERATE, json=BODY | {"weights": None}).content
    )
    assert (answer.weights, len(answer.completions)) == (LOADED, 2)
    store.weights, engine.parts = None, [part(0, versions=())]
    answer = GenerateResponse.model_validate_json(
        client.post(protocol.GENERATE, json=BODY | {"weights": None}).content
    )
    assert (answer.weights, len(answer.completions)) == (None, 1)


def test_weights_that_came_meanwhile_are_not_taken_for_those_of_the_start(
    client: TestClient, store: Store, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, store.weights = engine.generate, None

    def late(*arguments: Any) -> AsyncIterator[Any]:
        store.weights = LOADED
        return generate(*arguments)

    monkeypatch.setattr(engine, "generate", late)
    answer = client.post(protocol.GENERATE, json=BODY | {"weights": None})
    response = GenerateResponse.model_validate_json(answer.content)
    assert (response.completions, response.interrupted) == ([], "the weights changed while it was generated")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([part(0), part(1, "abort")], "generation ended with abort"),
        ([part(0), part(1, "error")], "generation ended with error"),
        ([part(0), part(1, versions=("run:4", "run:5"))], "the weights changed"),
        ([part(0), part(1, versions=("run:3",))], "the weights changed"),
        ([part(0, versions=()), part(1, versions=())], "the weights changed"),
    ],
    ids=["abort", "error", "changed on the way", "of before", "not known"],
)
def test_a_group_that_is_not_whole_or_of_other_weights_is_not_given(
    client: TestClient, engine: Engine, parts: list[Any], reason: str
) -> None:
    engine.parts = parts
    answer = client.post(protocol.GENERATE, json=BODY)
    assert answer.status_code == 200
    response = GenerateResponse.model_validate_json(answer.content)
    assert response.completions == []
    assert reason in str(response.interrupted)


def test_weights_go_to_the_store(client: TestClient, store: Store) -> None:
    weights = {"run": "run", "version": 5}
    begun = client.post(protocol.BEGIN_WEIGHTS, json={"weights": weights, "tensors": TENSORS})
    committed = client.post(protocol.COMMIT_WEIGHTS, json={"weights": weights, "digest": "d"})
    assert begun.json() == {"path": "/memory/weights"}
    assert protocol.Committed.model_validate_json(committed.content).weights.version == 5
    begin, commit = store.taken
    assert [spec.name for spec in begin.tensors] == ["w"]
    assert commit.digest == "d"


TRANSFERS = {
    protocol.BEGIN_WEIGHTS: {"weights": LOADED.model_dump(), "tensors": TENSORS},
    protocol.COMMIT_WEIGHTS: {"weights": LOADED.model_dump(), "digest": "d"},
}


@pytest.mark.parametrize("path", TRANSFERS)
def test_a_long_transfer_is_told_from_a_link_that_carries_nothing(
    client: TestClient, store: Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.01)
    store.takes_s = 0.1
    answer = client.post(path, json=TRANSFERS[path])
    assert answer.content.startswith(b"  ")
    assert answer.json().keys() & {"path", "digest"}


@pytest.mark.parametrize("path", TRANSFERS)
def test_a_transfer_that_fails_late_is_refused_in_its_body(
    client: TestClient, store: Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.refusal = HTTPException(507, "no room")
    assert client.post(path, json=TRANSFERS[path]).status_code == 507
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.01)
    store.takes_s = 0.1
    answer = client.post(path, json=TRANSFERS[path])
    assert answer.status_code == 200
    assert answer.json() == {"status": 507, "detail": "no room"}


def test_an_engine_that_hangs_in_a_transfer_is_given_up(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(protocol, "TRANSFER_TIMEOUT_S", 0.05)
    store.takes_s = PATIENCE_S
    assert client.post(protocol.COMMIT_WEIGHTS, json=TRANSFERS[protocol.COMMIT_WEIGHTS]).json()["status"] == 504


def test_a_transfer_goes_on_when_its_client_has_gone(
    app: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.01)
    store.takes_s = 0.1

    async def leave() -> None:
        path = protocol.COMMIT_WEIGHTS
        await stream(app, asyncio.Event(), path, TRANSFERS[path])
        assert store.taken == []
        await asyncio.sleep(0.2)
        assert len(store.taken) == 1

    asyncio.run(leave())


def test_a_long_generation_is_told_from_a_server_that_hangs(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.01)
    engine.answers_needed = 3
    answer = client.post(protocol.GENERATE, json=BODY)
    blanks = len(answer.content) - len(answer.content.lstrip())
    assert blanks >= 3
    assert blanks == engine.asked, "a blank for each time that the engine answered"
    assert len(GenerateResponse.model_validate_json(answer.content).completions) == 2


def test_a_request_that_came_too_late_for_the_old_weights_is_to_be_sent_again(
    client: TestClient, engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.01)
    engine.answers_needed = 10**9
    check = routes.check_weights

    def admit(*arguments: Any) -> None:
        check(*arguments)
        store.is_drained, store.refusing = True, "on its way"

    monkeypatch.setattr(routes, "check_weights", admit)
    answer = GenerateResponse.model_validate_json(client.post(protocol.GENERATE, json=BODY).content)
    assert (answer.completions, answer.interrupted) == ([], "on its way")


async def stream(
    app: Any, hang_up: asyncio.Event, path: str = protocol.GENERATE, content: Any = BODY
) -> list[Any]:
    """What the app sends for a request whose client goes when `hang_up` is set."""
    sent: list[Any] = []
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "scheme": "http", "server": ("s", 1),
    }  # fmt: skip
    body: list[Any] = [{"type": "http.request", "body": json.dumps(content).encode(), "more_body": False}]

    async def receive() -> Any:
        if body:
            return body.pop()
        await hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body", b"").strip() == b"" and message["type"] == "http.response.body":
            hang_up.set()

    await asyncio.wait_for(app(scope, receive, send), PATIENCE_S)
    return sent


def test_what_nobody_waits_for_is_not_generated_any_longer(
    app: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.01)
    engine.answers_needed = 10**9

    async def leave() -> list[Any]:
        sent = await stream(app, asyncio.Event())
        await asyncio.sleep(0)
        assert engine.is_cancelled
        return sent

    sent = asyncio.run(leave())
    assert b"".join(message.get("body", b"") for message in sent).strip() == b""


def test_what_nobody_waits_for_from_the_start_is_given_up_before_the_first_sign_of_life(
    app: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 10 * PATIENCE_S)
    engine.answers_needed = 10**9

    async def leave() -> None:
        has_left = asyncio.Event()
        has_left.set()
        await stream(app, has_left)
        async with asyncio.timeout(PATIENCE_S):
            while not engine.is_cancelled:
                await asyncio.sleep(0)

    asyncio.run(leave())


def test_an_engine_that_died_ends_the_answer_without_a_document(
    app: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.01)
    engine.answers_needed, engine.error = 10**9, RuntimeError("engine core died")
    with pytest.raises(BaseException) as caught, TestClient(app) as client:  # noqa: PT011
        client.post(protocol.GENERATE, json=BODY)
    errors = caught.value.exceptions if isinstance(caught.value, BaseExceptionGroup) else [caught.value]
    assert [str(error) for error in errors] == ["engine core died"]
    assert engine.is_cancelled


def test_while_weights_are_on_their_way_the_other_routes_do_not_generate(client: TestClient, store: Store) -> None:
    assert client.post("/v1/completions").status_code == 200
    store.refusing = "on its way"
    for method, path in (("POST", "/v1/completions"), ("PUT", "/v1/models"), ("POST", "/no/such")):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()) == (503, {"detail": "on its way"})
    for method in ("GET", "HEAD"):
        assert client.request(method, "/v1/models").status_code == 200
    assert client.get(protocol.INFO).status_code == 200
    begun = client.post(protocol.BEGIN_WEIGHTS, json={"weights": BODY["weights"], "tensors": TENSORS})
    assert begun.status_code == 200
    store.refusing = None
    assert client.post("/v1/completions").status_code == 200


def test_while_weights_are_on_their_way_no_websocket_opens(client: TestClient, store: Store) -> None:
    with client.websocket_connect("/v1/realtime") as websocket:
        assert websocket.receive_text() == "hello"
    store.refusing = "on its way"
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/v1/realtime"):
        pass
    assert closed.value.code == 1013


def test_the_gate_lets_the_app_start_while_the_server_refuses(app: Any, store: Store) -> None:
    store.refusing = "no weights yet"
    with TestClient(app) as client:
        assert client.get("/v1/models").status_code == 200
