"""A server that speaks `grpo_cli.serve.protocol` without vLLM, and fails as it is told to."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from grpo_cli.serve import protocol, wire
from grpo_cli.serve.protocol import BeginWeights, CommitWeights, GenerateRequest, TensorSpec, Weights

PATIENCE_S = 20.0
"""How long a test waits for another thread before it fails."""

MARKER = "marker"
"""The tensor whose value tells the weights apart: it is the first token of every completion."""


class FakePolicy:
    """Weights that say which version they are."""

    def __init__(self, version: int = 0, num_tensors: int = 3) -> None:
        self.device = torch.device("cpu")
        self.tensors = {f"t{i}": torch.full((5, i + 1), float(version)) for i in range(num_tensors)}
        self.tensors[MARKER] = torch.zeros(1)
        self.set(version)

    def set(self, version: int) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(version)

    def specs(self, dtype: Any) -> list[TensorSpec]:
        return [TensorSpec(name=name, dtype=dtype, shape=list(t.shape)) for name, t in self.tensors.items()]

    @contextlib.contextmanager
    def gathered(self, names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        yield lambda name: {name: self.tensors[name] for name in names}[name]


class FakeServer:
    """Listens on 127.0.0.1; `die` and `rise` on the same port, the latter as a new instance without weights.

    `faults[path]` are what the next requests of a path meet, one each, None for none:
    a status; "drop" (the connection ends unanswered), "lose" (so it does, after the work was done), "silent" (no
    answer until the server ends), "garbage" (not HTTP), "html" and "other json" (not the protocol), "restart" (the
    process is replaced, and the connection lost).
    """

    def __init__(self, folder: Path, *, key: str | None = None, shares_memory: bool = True) -> None:
        self.folder = folder
        self.key = key
        self.shares_memory = shares_memory
        self.dtype = "float32"
        self.max_num_seqs, self.max_model_len = 64, 512
        self.faults: dict[str, list[Any]] = defaultdict(list)
        self.always: dict[str, Any] = {}
        """Faults that never end."""
        self.calls: list[str] = []
        self.rendezvous: list[Any] = []
        self.generated: list[GenerateRequest] = []
        """Requests that were answered with completions."""
        self.before_generate: Callable[[GenerateRequest], Any] = lambda request: None
        self.answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        """What becomes of the answer to a path."""
        self._lock = threading.RLock()
        self._connections: set[socket.socket] = set()
        self._groups: dict[str, Any] = {}
        self._http: ThreadingHTTPServer | None = None
        self.port = 0
        self.rise()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rise(self) -> None:
        self.instance = secrets.token_hex(8)
        self.weights: Weights | None = None
        self.refusing: str | None = None
        self.loaded: dict[str, torch.Tensor] = {}
        self.begun: BeginWeights | None = None
        self.gone = threading.Event()
        place = self.folder / self.instance
        place.mkdir(mode=0o700)
        self.probe, self.staging = place / "instance", place / protocol.STAGING_FILE
        if self.shares_memory:
            self.probe.write_text(self.instance)
        self._http = _Http(("127.0.0.1", self.port), _handler_of(self))
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        """Stop listening and break every connection off."""
        http, self._http = self._http, None
        if http is None:
            return
        self.gone.set()
        http.shutdown()
        http.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._connections.clear()

    def restart(self) -> None:
        self.die()
        self.rise()

    def count(self, path: str) -> int:
        return self.calls.count(path)

    def fault(self, path: str) -> Any:
        with self._lock:
            self.calls.append(path)
            queue = self.faults[path]
            return queue.pop(0) if queue else self.always.get(path)

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        work = {
            protocol.INFO: self.info,
            protocol.GENERATE: lambda: self.generate(GenerateRequest.model_validate_json(body)),
            protocol.BEGIN_WEIGHTS: lambda: self.begin(BeginWeights.model_validate_json(body)),
            protocol.COMMIT_WEIGHTS: lambda: self.commit(CommitWeights.model_validate_json(body)),
        }.get(path)
        if work is None:
            return 404, {"detail": "Not Found"}
        status, answer = work()
        return status, self.answers.get(path, lambda given: given)(answer)

    def info(self) -> tuple[int, dict[str, Any]]:
        return 200, {
            "instance": self.instance, "weights": self.weights and self.weights.model_dump(),
            "refusing": self.refusing, "dtype": self.dtype, "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs, "world_size": 1, "devices": ["cpu"],
            "memory_probe": str(self.probe),
        }  # fmt: skip

    def generate(self, request: GenerateRequest) -> tuple[int, dict[str, Any]]:
        self.before_generate(request)
        with self._lock:
            if self.refusing is not None or (request.weights is not None and request.weights != self.weights):
                return 409, {"detail": self.refusing or f"the server has {self.weights}"}
            self.generated.append(request)
            marker = int(self.loaded[MARKER].item())
            parts = [
                {"token_ids": tokens_of(request, marker, i), "logprobs": [-0.5, -0.25], "finish_reason": "stop"}
                for i in range(request.n)
            ]
            return 200, {"weights": self.weights and self.weights.model_dump(), "completions": parts}

    def begin(self, request: BeginWeights) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.refusing, self.begun = f"{request.weights} is on its way", request
            self.rendezvous.append(request.rendezvous)
            if request.rendezvous is not None:
                return 200, {"path": None}
            with self.staging.open("wb") as file:
                file.truncate(wire.total_bytes(wire.plan_buckets(request.tensors)))
            return 200, {"path": str(self.staging)}

    def commit(self, request: CommitWeights) -> tuple[int, dict[str, Any]]:
        begun = self.begun
        if begun is None or begun.weights != request.weights:
            return 409, {"detail": f"{request.weights} was not begun"}
        self.begun = None
        buckets, digest, loaded = wire.plan_buckets(begun.tensors), wire.Digest(), {}
        receive = self._receiver(begun)
        for bucket in buckets:
            flat = receive(bucket)
            digest.add(bucket, flat)
            loaded |= {name: tensor.clone() for name, tensor in wire.tensors_in(bucket, flat)}
        expected = request.digest
        if begun.rendezvous is not None:
            expected = bytes(receive(wire.Bucket([], 0, wire.DIGEST_BYTES)).tolist()).decode()
        if digest.hexdigest() != expected:
            return 500, {"detail": f"what arrived has digest {digest.hexdigest()}, what was sent {expected}"}
        with self._lock:
            self.loaded, self.weights, self.refusing = loaded, begun.weights, None
        answer = {"weights": begun.weights.model_dump(), "digest": digest.hexdigest()}
        return 200, answer

    def _receiver(self, begun: BeginWeights) -> Callable[[wire.Bucket], torch.Tensor]:
        if begun.rendezvous is None:
            size = wire.total_bytes(wire.plan_buckets(begun.tensors))
            whole = torch.from_file(str(self.staging), shared=True, size=size, dtype=torch.uint8)
            return lambda bucket: whole[bucket.start : bucket.start + bucket.size]
        meeting = begun.rendezvous
        if meeting.group not in self._groups:
            store = wire.find_sender(meeting.host, meeting.port, PATIENCE_S)
            group = wire.join_group(
                meeting.backend, store, 1, meeting.world_size, "127.0.0.1", PATIENCE_S, torch.device("cpu")
            )
            self._groups[meeting.group] = (group, store)
        group, _ = self._groups[meeting.group]

        def receive(bucket: wire.Bucket) -> torch.Tensor:
            flat = torch.full((bucket.size,), 255, dtype=torch.uint8)
            wire.broadcast(group, flat)
            return flat

        return receive


def tokens_of(request: GenerateRequest, marker: int, index: int) -> list[int]:
    """Completion `index`: the weights that made it, and what its seed drew."""
    return [marker, ((request.seed or 0) + index) % 251]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


def _handler_of(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            with server._lock:
                server._connections.add(self.connection)

        def finish(self) -> None:
            with contextlib.suppress(OSError):
                super().finish()

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError, ValueError):
                super().handle()

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            gone, fault = server.gone, server.fault(self.path)
            if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                fault = 401
            if fault == "silent":
                gone.wait(PATIENCE_S)
            if fault == "restart":
                server.restart()
            if fault == "lose":
                server.answer(self.path, body)
            if fault == "garbage":
                self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
            if fault in ("silent", "restart", "lose", "garbage", "drop"):
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
            elif fault == "html":
                self._send(200, b"<html>welcome</html>", "text/html")
            elif fault == "other json":
                self._send(200, b'{"object": "list"}')
            elif fault is not None:
                self._send(fault, json.dumps({"detail": f"told to answer {fault}"}).encode())
            else:
                status, answer = server.answer(self.path, body)
                if not gone.is_set():
                    self._send(status, json.dumps(answer).encode())

        def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
