"""Only who has the key gets in, by whatever door; and a key file is its owner's alone."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.errors import UserError
from grpo_cli.serve import lock
from grpo_cli.serve.lock import MAX_KEY_BYTES, Lock, is_loopback, make_key_file, read_key

KEY = "correct-horse-battery-staple"
RIGHT = [(b"authorization", b"Bearer " + KEY.encode())]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "ODD"]


class Inner:
    """The app behind the lock: it keeps the scopes that reached it."""

    def __init__(self) -> None:
        self.reached: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope)


def connection(kind: str = "http", path: str = "/v1/models", **changes: Any) -> dict[str, Any]:
    scope = {"type": kind, "path": path, "raw_path": path.encode(), "root_path": "", "headers": []}
    if kind == "http":
        scope["method"] = "GET"
    return scope | changes


def knock(scope: dict[str, Any], key: str | None = KEY) -> tuple[bool, list[Any]]:
    """Whether the app behind the lock was reached, and what the lock itself sent."""
    inner, sent = Inner(), []

    async def receive() -> Any:
        raise AssertionError("a lock decides without reading the request's body")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Lock(inner, key)(scope, receive, send))
    assert all(reached is scope for reached in inner.reached)
    return bool(inner.reached), sent


def is_refused(scope: dict[str, Any]) -> bool:
    reached, sent = knock(scope)
    assert reached == (not sent)
    if sent and scope["type"] == "http":
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        headers = dict(sent[0]["headers"])
        assert sent[0]["status"] == 401
        assert headers[b"www-authenticate"] == b"Bearer"
        assert headers[b"content-length"] == str(len(sent[1]["body"])).encode()
    elif sent:
        assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]
    return bool(sent)


PATHS = ["", "/", "*", "/v1/completions", "/metrics", "/docs", "/openapi.json", "/mounted/x", "/no/such", "/ü"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_path_needs_the_key(method: str, path: str) -> None:
    scope = connection(path=path, method=method)
    assert is_refused(scope)
    assert not is_refused(scope | {"headers": RIGHT})


@pytest.mark.parametrize("path", [*PATHS, "/health"])
def test_every_websocket_needs_the_key(path: str) -> None:
    scope = connection("websocket", path)
    assert is_refused(scope)
    assert is_refused(scope | {"headers": [(b"authorization", b"Bearer not-the-key")]})
    assert not is_refused(scope | {"headers": RIGHT})


@pytest.mark.parametrize("method", METHODS)
def test_health_is_open_to_who_only_reads_it(method: str) -> None:
    assert is_refused(connection(path="/health", method=method)) == (method not in ("GET", "HEAD"))


@pytest.mark.parametrize(
    "scope",
    [
        connection(path="/health", query_string=b"verbose=1"),
        connection(path="/health", raw_path=None),
        {name: value for name, value in connection(path="/health").items() if name != "raw_path"},
        {name: value for name, value in connection(path="/health").items() if name != "root_path"},
        connection(path="/health", headers=[(b"authorization", b"Bearer not-the-key")]),
    ],
    ids=["query", "raw path None", "no raw path", "no root path", "wrong key"],
)
def test_health_is_open_however_the_server_describes_it(scope: dict[str, Any]) -> None:
    assert not is_refused(scope)


@pytest.mark.parametrize(
    ("path", "raw_path", "root_path"),
    [
        ("/health/", b"/health/", ""),
        ("//health", b"//health", ""),
        ("/health//", b"/health//", ""),
        ("health", b"health", ""),
        ("/Health", b"/Health", ""),
        ("/health/../v1", b"/health/../v1", ""),
        ("/v1/../health", b"/v1/../health", ""),
        ("/./health", b"/./health", ""),
        ("/health;x", b"/health;x", ""),
        ("/health?x", b"/health%3Fx", ""),
        ("/health#x", b"/health#x", ""),
        ("/health ", b"/health%20", ""),
        ("/health\n", b"/health%0A", ""),
        ("/health\x00", b"/health%00", ""),
        ("/health/x", b"/health%2Fx", ""),
        ("/health", b"/%68ealth", ""),
        ("/health", b"%2Fhealth", ""),
        ("/health", b"/v1/models", ""),
        ("/v1/models", b"/health", ""),
        ("/healthz", b"/healthz", ""),
        ("/mounted/health", b"/mounted/health", ""),
        ("/api/health", b"/api/health", "/api"),
        ("/health", b"/health", "/api"),
        ("/health", b"/health", "/health"),
        ("/health/v1", b"/health/v1", "/health"),
        ("http://x/health", b"http://x/health", ""),
    ],
)
def test_only_the_exact_path_of_health_is_open(path: str, raw_path: bytes, root_path: str) -> None:
    scope = connection(path=path, raw_path=raw_path, root_path=root_path)
    assert is_refused(scope)
    assert not is_refused(scope | {"headers": RIGHT})


@pytest.mark.parametrize("name", [b"authorization", b"Authorization", b"AUTHORIZATION"])
@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER"])
def test_header_name_and_scheme_have_no_case(name: bytes, scheme: bytes) -> None:
    headers = [(b"host", b"x"), (name, scheme + b" " + KEY.encode()), (b"accept", b"*/*")]
    assert not is_refused(connection(headers=headers))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        KEY.encode(),
        b" " + KEY.encode(),
        b"Basic " + KEY.encode(),
        b"Token " + KEY.encode(),
        b"Bearer:" + KEY.encode(),
        b"Bearer\t" + KEY.encode(),
        b"Bearer" + KEY.encode(),
        b"Bearer Bearer " + KEY.encode(),
        b"Bearer " + KEY.encode()[:-1],
        b"Bearer " + KEY.encode()[1:],
        b"Bearer " + KEY.encode() + b"x",
        b"Bearer x" + KEY.encode(),
        b"Bearer " + KEY.encode() + b" ",
        b"Bearer " + KEY.encode() + b"\x00",
        b"Bearer " + KEY.encode() + b", Bearer x",
        b"Bearer " + KEY.upper().encode(),
        b'Bearer "' + KEY.encode() + b'"',
        b"Bearer None",
        b"Bearer " + "schlüssel-schlüssel".encode(),
        b"Bearer " + "schlüssel-schlüssel".encode("latin-1"),
        b"Bearer " + KEY.replace("o", "о").encode(),  # the Cyrillic letter
        b"\xff\xfe\x00",
        b"B\xc3\xa9arer " + KEY.encode(),
    ],
)
def test_a_header_that_is_not_exactly_the_key_is_refused(value: bytes) -> None:
    assert is_refused(connection(headers=[(b"authorization", value)]))


@pytest.mark.parametrize(
    "name", [b"x-authorization", b"proxy-authorization", b"cookie", b"x-api-key", b"\xff", b""]
)
def test_the_key_in_another_header_is_refused(name: bytes) -> None:
    assert is_refused(connection(headers=[(name, RIGHT[0][1])]))


@pytest.mark.parametrize("others", [b"Bearer x", b"", RIGHT[0][1]])
@pytest.mark.parametrize("turn", [1, -1])
def test_two_authorization_headers_are_refused(others: bytes, turn: int) -> None:
    assert is_refused(connection(headers=[*RIGHT, (b"Authorization", others)][::turn]))


def test_the_key_in_the_query_is_refused() -> None:
    assert is_refused(connection(query_string=f"key={KEY}&access_token={KEY}".encode()))


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(lock.hmac, "compare_digest", lambda a, b: compared.append({a, b}) or False)
    assert is_refused(connection(headers=RIGHT))
    assert compared == [{KEY.encode()}]


def test_lifespan_passes() -> None:
    assert knock({"type": "lifespan"}) == (True, [])


def test_an_unknown_kind_of_connection_is_refused() -> None:
    inner = Inner()
    with pytest.raises(ValueError, match="webtransport"):
        asyncio.run(Lock(inner, KEY)(connection("webtransport", headers=RIGHT), None, None))  # type: ignore[arg-type]
    assert not inner.reached


@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan", "webtransport"])
def test_without_a_key_everything_passes(kind: str) -> None:
    assert knock(connection(kind), key=None) == (True, [])


def test_an_empty_key_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty key"):
        Lock(Inner(), "")


@pytest.fixture
def client() -> Any:
    """A client of a FastAPI app with its documentation pages, CORS, a mounted app and a websocket."""
    fastapi = pytest.importorskip("fastapi")
    from fastapi.middleware.cors import CORSMiddleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import WebSocketRoute
    from starlette.testclient import TestClient

    app = fastapi.FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])
    app.add_api_route("/health", lambda: "well", methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/v1/models", lambda: "models")
    app.mount("/mounted", PlainTextResponse("mounted"))

    async def echo(websocket: Any) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    app.router.routes.append(WebSocketRoute("/echo", echo))
    with TestClient(Lock(app, KEY), follow_redirects=False) as client:
        yield client


BEARER = {"Authorization": f"Bearer {KEY}"}
PREFLIGHT = {"Origin": "http://x", "Access-Control-Request-Method": "GET"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models/", 307),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/health/", 307),
        ("OPTIONS", "/v1/models", 200),
        ("OPTIONS", "/health", 200),
        ("GET", "/mounted/x", 200),
        ("GET", "/docs", 200),
        ("GET", "/redoc", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/metrics", 404),
        ("GET", "/no/such", 404),
    ],
)
def test_a_real_app_answers_only_who_has_the_key(client: Any, method: str, path: str, status: int) -> None:
    refused = client.request(method, path, headers=PREFLIGHT)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "access-control-allow-origin" not in refused.headers
    assert "Bearer KEY" in refused.json()["detail"]
    assert client.request(method, path, headers=PREFLIGHT | BEARER).status_code == status


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_real_app_tells_everyone_its_health(client: Any, method: str) -> None:
    assert client.request(method, "/health").status_code == 200


def test_a_real_websocket_opens_only_with_the_key(client: Any) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/echo"):
        pass
    assert closed.value.code == 1008
    with client.websocket_connect("/echo", headers=BEARER) as websocket:
        websocket.send_text("hello")
        assert websocket.receive_text() == "hello"


def key_file(folder: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("newline", ["", "\n", "\r\n"])
@pytest.mark.parametrize("key", [KEY, "!" + "~" * 15, "x" * MAX_KEY_BYTES], ids=["usual", "shortest", "longest"])
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_is_read_less_its_newline(tmp_path: Path, key: str, newline: str, mode: int) -> None:
    assert read_key(key_file(tmp_path, key + newline, mode)) == key
    assert read_key(str(tmp_path / "key")) == key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("\r\n", "is empty"),
        ("secret-secret-s", "has 15 characters; it needs at least 16"),
        ("secret-secret-s\n", "has 15 characters; it needs at least 16"),
        ("secret-secret-secret\n\n", "without spaces"),
        ("\nsecret-secret-secret", "without spaces"),
        ("secret-secret-secret\r", "without spaces"),
        ("secret-secret secret", "without spaces"),
        (" secret-secret-secret", "without spaces"),
        ("secret-secret-secret ", "without spaces"),
        ("secret-secret\tsecret", "without spaces"),
        ("secret-secret\x00secret", "printable ASCII"),
        ("secret-secret\x7fsecret", "printable ASCII"),
        ("secret-secret-sécret", "printable ASCII"),
        ("\ufeffsecret-secret-secret", "printable ASCII"),
        (b"secret-secret-\xff\xfe-secret", "printable ASCII"),
        ("secret" * 1000, "more than 4096 characters"),
        ("s" * (MAX_KEY_BYTES + 1), "more than 4096 characters"),
        ("s" * (MAX_KEY_BYTES + 1) + "\r\n", "more than 4096 characters"),
    ],
)
def test_what_is_no_key_is_refused_and_not_quoted(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = key_file(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        read_key(path)
    shown = str(caught.value)
    assert str(path) in shown
    assert "secret" not in shown.replace(str(path), "")
    assert "\n" not in shown


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o666, 0o777, 0o444])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, KEY, mode)
    with pytest.raises(UserError, match=f"chmod 600 {path}$") as caught:
        read_key(path)
    assert KEY not in str(caught.value)
    path.chmod(0o600)
    assert read_key(path) == KEY


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is no key file {tmp_path}/key"):
        read_key(tmp_path / "key")


def test_a_folder_is_no_key_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(UserError, match=f"{tmp_path} is a folder"):
        read_key(tmp_path)


def test_a_pipe_is_no_key_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UserError, match="not a regular file"):
        read_key(tmp_path / "pipe")


@pytest.mark.parametrize("function", [read_key, make_key_file])
@pytest.mark.parametrize("name", ["key/inside", "k\0y", "k" * 300])
def test_an_impossible_path_is_an_error_of_the_user(tmp_path: Path, function: Any, name: str) -> None:
    key_file(tmp_path, KEY)
    with pytest.raises(UserError, match="key file"):
        function(tmp_path / name)
    assert os.listdir(tmp_path) == ["key"]


def test_a_refusal_by_the_system_is_an_error_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated, since no mode keeps root out.
    def denied(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(lock.os, "open", denied)
    with pytest.raises(UserError, match=r"cannot read key file .*/key: Permission denied$"):
        read_key(key_file(tmp_path, KEY))


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o277, 0o777])
def test_a_made_key_is_its_owners_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "a" / "b" / "key"
    with umask(mask):
        key = make_key_file(path)
    assert mode_of(path) == 0o600
    assert mode_of(path.parent) == mode_of(path.parent.parent) == 0o700
    assert read_key(path) == key
    assert len(key) == 43  # 32 bytes in base64
    assert os.listdir(path.parent) == ["key"]


def test_made_keys_differ(tmp_path: Path) -> None:
    assert make_key_file(tmp_path / "a") != make_key_file(tmp_path / "b")


def test_the_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_key_file(tmp_path / "key")
    assert mode_of(tmp_path) == 0o755


def test_a_key_in_the_working_folder_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_key_file("key") == read_key(tmp_path / "key")


def test_a_key_that_is_there_is_used_again(tmp_path: Path) -> None:
    path = key_file(tmp_path, KEY + "\n")
    before = path.stat()
    assert make_key_file(path) == KEY
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [("", 0o600, "is empty"), ("short", 0o600, "at least 16"), (KEY, 0o644, "chmod 600")],
)
def test_a_bad_file_that_is_there_is_refused_and_kept(
    tmp_path: Path, content: str, mode: int, message: str
) -> None:
    path = key_file(tmp_path, content, mode)
    with pytest.raises(UserError, match=message):
        make_key_file(path)
    assert path.read_text() == content
    assert mode_of(path) == mode


def test_a_key_is_not_written_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="there is no key file"):
        make_key_file(tmp_path / "key")
    assert os.listdir(tmp_path) == ["key"]


def test_a_key_written_meanwhile_is_used_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(*args: Any) -> None:
        key_file(tmp_path, KEY)
        link(*args)

    monkeypatch.setattr(lock.os, "link", late)
    assert make_key_file(tmp_path / "key") == KEY
    assert os.listdir(tmp_path) == ["key"]


def test_the_key_appears_whole_and_readable_by_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, seen = os.link, []

    def watched(source: str, target: Path) -> None:
        assert not target.exists()
        seen.append((mode_of(Path(source)), Path(source).read_text().strip()))
        link(source, target)

    monkeypatch.setattr(lock.os, "link", watched)
    key = make_key_file(tmp_path / "key")
    assert seen == [(0o600, key)]


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted", "somewhere")

    monkeypatch.setattr(lock.os, "link", denied)
    with pytest.raises(UserError, match=r"cannot write key file .*/key: Operation not permitted$"):
        make_key_file(tmp_path / "key")
    assert os.listdir(tmp_path) == []


def test_all_who_make_a_key_at_once_get_the_same(tmp_path: Path) -> None:
    count = 8
    for attempt in range(20):
        together = threading.Barrier(count)

        def make(path: Path, together: threading.Barrier = together) -> str:
            together.wait(20)
            return make_key_file(path)

        with ThreadPoolExecutor(count) as pool:
            keys = set(pool.map(make, [tmp_path / str(attempt) / "in" / "key"] * count))
        assert len(keys) == 1


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.0.0", True),
        ("127.255.255.255", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("localhost", True),
        ("LocalHost", True),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        ("::2", False),
        ("128.0.0.1", False),
        ("126.255.255.255", False),
        ("10.0.0.5", False),
        ("::ffff:127.0.0.1", False),
        ("::1%eth0", False),
        ("[::1]", False),
        ("127.0.0.1:8000", False),
        ("127.0.0.1 ", False),
        ("127.0.0.256", False),
        ("127.0.0.1.example.com", False),
        ("localhost.example.com", False),
        ("localhost ", False),
        ("node1", False),
        ("*", False),
    ],
)
def test_loopback_hosts(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_lock_imports_neither_torch_nor_a_web_framework() -> None:
    heavy = ["torch", "vllm", "transformers", "starlette", "fastapi"]
    code = f"import sys, grpo_cli.serve.lock; sys.exit(' '.join(sys.modules.keys() & set({heavy})) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
