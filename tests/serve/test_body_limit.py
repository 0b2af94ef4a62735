"""Our own routes read no body that is larger than they need, whatever length it says it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from starlette.testclient import TestClient

from grpo_cli.serve import routes
from grpo_cli.serve.protocol import GENERATE, INFO
from grpo_cli.serve.routes import BodyLimit

LIMIT = 1000


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(routes, "MAX_BODY_BYTES", LIMIT)
    app = FastAPI()

    def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    for path in (GENERATE, "/v1/completions"):
        app.add_api_route(path, echo, methods=["POST"])
    app.add_api_route(INFO, lambda: "info", methods=["GET"])
    with TestClient(BodyLimit(app), headers={"Content-Type": "application/json"}) as client:
        yield client


def test_the_largest_body_that_is_allowed_is_read(client: TestClient) -> None:
    assert client.post(GENERATE, content=b'{"n": 1}'.ljust(LIMIT)).json() == {"n": 1}
    assert client.get(INFO).json() == "info"


@pytest.mark.parametrize(
    "content", [b"{}".ljust(LIMIT + 1), [b"{}", b" " * LIMIT]], ids=["announced", "in chunks"]
)
def test_a_larger_one_is_refused(client: TestClient, content: bytes | Iterable[bytes]) -> None:
    answer = client.post(GENERATE, content=iter(content) if isinstance(content, list) else content)
    assert answer.status_code == 413
    assert answer.json() == {"detail": "the body is larger than 1,000 bytes"}


def test_what_the_other_routes_take_is_theirs_to_decide(client: TestClient) -> None:
    assert client.post("/v1/completions", content=b"{}".ljust(2 * LIMIT)).status_code == 200
