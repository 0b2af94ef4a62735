"""A real `grpo serve` for tests, and what they ask of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch

from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server.connection import ServerConnection
from grpo_cli.rollout.server.spawned_server import free_port
from grpo_cli.rollout.server.weight_transfer import fill_memory
from grpo_cli.serve import wire
from grpo_cli.serve.protocol import (
    BEGIN_WEIGHTS,
    COMMIT_WEIGHTS,
    BeginWeights,
    Committed,
    CommitWeights,
    GenerateRequest,
    GenerateResponse,
    Staging,
    Weights,
)

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 240
PROMPT = list(range(40, 72))
"""Longer than a block of the cache, so that a prompt computed with old weights would be found there."""


class Serve:
    """`grpo serve` as a subprocess, with temporary files of its own.

    Args:
        model: folder.
        options: of the command line.
        environment: variables beside this process's own.
        locked: whether to pass `--api-key-file`.
    """

    def __init__(
        self, model: Path, *options: str, environment: dict[str, str] | None = None, locked: bool = True
    ) -> None:
        self.model = model
        # Sockets live in it, whose paths may have 107 characters: too few for pytest's folders.
        self.folder = Path(tempfile.mkdtemp(prefix="serve-"))
        self.key_file = self.folder / "key"
        self.log = self.folder / "log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TMPDIR": str(self.folder),
        } | (environment or {})  # fmt: skip
        key = ["--api-key-file", str(self.key_file)] if locked else []
        self.command = [
            sys.executable, "-m", "grpo_cli.cli", "serve", "--model", str(model), "--port", str(self.port),
            *key, *options,
        ]  # fmt: skip
        self._memory: list[Path] = []
        self._seen: set[int] = set()
        self.start()

    def start(self) -> None:
        """Start it, again if it has ended; `wait_ready` comes next."""
        self._start_of_log = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def wait_ready(self) -> Serve:
        wait_until(lambda: "ready: " in self.output() or self.process.poll() is not None, START_TIMEOUT_S)
        assert self.process.poll() is None, self.output()
        self._seen.update(process.pid for process in self.processes())
        if self.key_file.exists():
            self._memory.append(Path(self.client().info().memory_probe).parent)
        return self

    def running(self) -> Serve:
        """This server, started again if a test has ended it."""
        if self.process.poll() is not None:
            self.start()
            self.wait_ready()
        return self

    def output(self) -> str:
        """What it wrote since its last start."""
        return self.log.read_bytes()[self._start_of_log :].decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """The server's own and all below it."""
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def engine(self) -> psutil.Process:
        (engine,) = [
            p for p in psutil.Process(self.process.pid).children() if "EngineCore" in " ".join(p.cmdline())
        ]
        return engine

    def client(self, timeout_s: float = 60) -> ServerConnection:
        """As the trainer reaches it."""
        return ServerConnection(self.url, self.key_file.read_text().strip(), timeout_s)

    def http(self, key: str | None = None) -> httpx2.Client:
        """Without a key if none is given."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def key(self) -> str:
        return self.key_file.read_text().strip()

    def stop(self) -> None:
        """End it, and remove what a killed server leaves."""
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = self.processes()
            self.process.terminate()
            _, alive = psutil.wait_procs(processes, timeout=30)
            for process in alive:
                process.kill()
        self.process.wait()
        for pid in self._seen:
            Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_0").unlink(missing_ok=True)
        for folder in [self.folder, *self._memory]:
            shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], Any], timeout_s: float) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{condition} did not come true in {timeout_s} s")


def generate(server: ServerConnection, weights: Weights | None = None, **changes: Any) -> GenerateResponse:
    settings = {
        "token_ids": PROMPT,
        "n": 4,
        "max_completion_tokens": 16,
        "seed": 7,
        "temperature": 0.7,
        "weights": weights,
    }
    return server.generate(GenerateRequest(**(settings | changes)))


def send_set(
    client: ServerConnection,
    weights: Weights,
    policy: PolicyWeights,
    leave_out: str = "",
    digest: str | None = None,
) -> Committed:
    """As `send_weights` through memory, with something wrong."""
    specs = [spec for spec in policy.specs("float32") if spec.name != leave_out]
    staging = client._call(Staging, "POST", BEGIN_WEIGHTS, BeginWeights(weights=weights, tensors=specs))
    assert staging.path is not None
    counted = fill_memory(staging.path, wire.plan_buckets(specs), policy)
    commit = CommitWeights(weights=weights, digest=digest or counted)
    return client._call(Committed, "POST", COMMIT_WEIGHTS, commit)


@torch.no_grad()
def reference_logprobs(
    model: Any, prompt: Sequence[int], tokens: Sequence[int], temperature: float
) -> torch.Tensor:
    """(T,) log-probabilities of a completion's tokens, by transformers."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def drift(response: GenerateResponse, model: Any, temperature: float = 0.7) -> float:
    """Largest difference between the server's log-probabilities and those of `model`."""
    largest = 0.0
    for part in response.completions:
        expected = reference_logprobs(model, PROMPT, part.token_ids, temperature)
        largest = max(largest, (expected - torch.tensor(part.logprobs)).abs().max().item())
    return largest
