"""A `grpo serve` that the trainer starts for itself and stops when it ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from grpo_cli.distributed.environment import as_if_not_launched
from grpo_cli.errors import RunError, ServerLost
from grpo_cli.recipe.schema import ServerConfig
from grpo_cli.rollout.with_vllm import save_for_vllm
from grpo_cli.serve.engine_arguments import SHARED_GPU_MEMORY, as_options, refuse_splitting
from grpo_cli.serve.environment import prepare
from grpo_cli.serve.own_folder import OwnFolder

MAX_STARTS = 3
"""Starts in a row without anything generated in between, after which the server is given up."""

STOP_TIMEOUT_S = 20.0

LINGER_S = 5.0
"""Wait for an engine to notice that its server is gone, before it is killed."""


class SpawnedServer:
    """Starts a server on this machine, without weights: it gets the policy's.

    Args:
        model: its configuration is what is served.
        tokenizer: saved beside it.
        config: the recipe's `generation.server`.
        arguments: vLLM's engine arguments, as in `generation.vllm`.
        log: file for the server's output.
        training: the GPUs of this machine that the policy trains on, by torch's numbers.

    Raises:
        UserError: an argument cannot be served with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: ServerConfig,
        arguments: Mapping[str, Any],
        log: Path,
        *,
        training: Collection[int] = (0,),
    ) -> None:
        refuse_splitting(arguments, "generation.vllm.{}".format)
        self.port = config.port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._devices = server_devices(
            torch.cuda.device_count(),
            config.tensor_parallel_size * int(arguments.get("data_parallel_size", 1)),
            os.environ.get("CUDA_VISIBLE_DEVICES"),
            training,
        )
        self.key = secrets.token_urlsafe(32)
        self._key_file = _in_memory(self.key)
        self._folder = OwnFolder("grpo-train-")
        save_for_vllm(model, tokenizer, self._folder.path / "model")
        if torch.cuda.is_available() and self._devices is None:
            arguments = {"gpu_memory_utilization": SHARED_GPU_MEMORY, **arguments}
        self._command = [
            sys.executable, "-m", "grpo_cli.cli", "serve",
            "--model", str(self._folder.path / "model"), "--load-format", "dummy",
            "--port", str(self.port), "--api-key-file", f"/dev/fd/{self._key_file.fileno()}",
            "--tp", str(config.tensor_parallel_size), "--stop-with-stdin",
            *as_options(arguments),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0  # since it last generated
        self._is_stopped = False

    def ensure_running(self) -> None:
        """Start the server, again if it has ended.

        Raises:
            ServerLost: it was started several times in a row already.
            RunError: it was stopped for good.
        """
        if self._is_stopped:  # a thread that still waits for an answer must not start it again
            raise RunError("the rollout server was stopped at the end of the run")
        if self._process is not None and self._process.poll() is None:
            return
        if self._starts >= MAX_STARTS:
            raise ServerLost(
                f"the rollout server ended {MAX_STARTS} times in a row; its log is {self.log}\n"
                f"{self._last_lines()}"
            )
        self._kill_group()
        self._starts += 1
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = as_if_not_launched(os.environ)
        prepare(environment)
        if self._devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices
        with self.log.open("ab") as log:
            # Its standard input closes when this process ends, in whatever way, and so it ends too.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
                start_new_session=True, pass_fds=[self._key_file.fileno()],
            )  # fmt: skip

    def has_generated(self) -> None:
        """It works: an end that comes now is the first of a row."""
        self._starts = 0

    def check(self) -> None:
        """Raise RunError if the server has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise RunError(
                f"the rollout server ended with code {self._process.returncode}; its log is {self.log}\n"
                f"{self._last_lines()}"
            )

    def _last_lines(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()
            telling = [line for line in lines if "grpo serve:" in line or "Error" in line]
            return "\n".join((telling or lines)[-5:])
        return ""

    def stop(self) -> None:
        """Ask the server to end, make it end, and remove what was made for it."""
        self._is_stopped = True
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            if self._process.poll() is None:
                self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
            self._kill_group()
            self._process.wait()
        self._key_file.close()
        self._folder.remove()

    def _kill_group(self) -> None:
        """End what is left of the server, after a moment in which it may end by itself and clean up."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            deadline = time.monotonic() + LINGER_S
            while time.monotonic() < deadline:
                self._process.poll()
                os.killpg(self._process.pid, 0)
                time.sleep(0.05)
            os.killpg(self._process.pid, signal.SIGKILL)


def _in_memory(text: str) -> BinaryIO:
    """A file that lies on no disk: it ends with the processes that have it open."""
    file = open(os.memfd_create("key"), "wb", buffering=0)  # noqa: SIM115
    os.fchmod(file.fileno(), 0o600)
    file.write(text.encode())
    return file


def server_devices(count: int, wanted: int, visible: str | None, training: Collection[int]) -> str | None:
    """The last `wanted` of `count` GPUs that no policy trains on, as CUDA_VISIBLE_DEVICES names them.

    None where there are not enough for both: then they share, within SHARED_GPU_MEMORY.
    """
    free = [index for index in range(count) if index not in training]
    if len(free) < wanted:
        return None
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return ",".join(names[index] for index in free[-wanted:])


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
