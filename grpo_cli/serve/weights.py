"""Which weights the server has, and whether they are whole."""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import HTTPException

from grpo_cli.errors import one_line
from grpo_cli.serve import wire
from grpo_cli.serve.own_folder import OwnFolder
from grpo_cli.serve.protocol import (
    STAGING_FILE,
    BeginWeights,
    Committed,
    CommitWeights,
    Staging,
    Weights,
)

ALIVE_CHECK_S = 1.0
"""Between two looks at whether an engine that has not answered is still there."""

FOLDER_PREFIX = "grpo-serve-"

Answer = TypeVar("Answer")


class WeightStore:
    """From `begin` until a whole set is loaded the server refuses to generate; so it does after a failure.

    Args:
        engine: vLLM's AsyncLLM.
        refusing: why the server cannot generate from what it started with, if it cannot.
        devices: what each worker computes on.
    """

    def __init__(self, engine: Any, refusing: str | None = None, devices: Sequence[str] = ()) -> None:
        self.engine = engine
        self.devices = list(devices)
        self.weights: Weights | None = None
        self.refusing = refusing
        self.instance = secrets.token_hex(8)
        self.is_drained = False
        """Whether generation has stopped: what is asked for now waits for the next whole set."""
        self._begun: BeginWeights | None = None
        self._lock = asyncio.Lock()
        # A whole model lies in it, so that what killed servers have left must go.
        self._folder = OwnFolder(FOLDER_PREFIX, memory_folder(), self.instance)
        self.probe = self._folder.owner

    async def begin(self, request: BeginWeights) -> Staging:
        """Finish what is in flight, stop generating, and make room for a set of weights."""
        async with self._lock:
            self._begun = None
            self.refusing = f"{request.weights} of the weights is on its way"
            await while_alive(self.engine, self.engine.pause_generation(mode="wait"))
            self.is_drained = True
            path = None
            if request.rendezvous is None:
                path = self._make_room(wire.total_bytes(wire.plan_buckets(request.tensors)))
            self._begun = request
            return Staging(path=path)

    def _make_room(self, size: int) -> str:
        path = self._folder.path / STAGING_FILE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            path.unlink(missing_ok=True)
            self.refusing = f"{path.parent} has no room for {size:,} bytes of weights: {error.strerror}"
            raise HTTPException(507, self.refusing) from error
        return str(path)

    async def commit(self, request: CommitWeights) -> Committed:
        """Load the set that was begun, drop what was computed with the old one, and generate again."""
        async with self._lock:
            begun = self._begun
            if begun is None or begun.weights != request.weights:
                raise HTTPException(409, f"{request.weights} was not begun, or another transfer began after it")
            self._begun = None
            update: dict[str, Any] = {
                "tensors": [spec.model_dump() for spec in begun.tensors],
                "digest": request.digest,
            }
            if begun.rendezvous is None:
                update["path"] = str(self._folder.path / STAGING_FILE)
            else:
                update["rendezvous"] = begun.rendezvous.model_dump()
                update["timeout_s"] = begun.rendezvous.timeout_s
            try:
                loading = self.engine.collective_rpc("load_weight_set", args=(update,))
                digests = await while_alive(self.engine, loading)
                if len(set(digests)) != 1:
                    raise ValueError(f"the workers got different weights: digests {', '.join(digests)}")
                await self.engine.update_weight_version(label(request.weights))
                if not await self.engine.reset_prefix_cache(reset_running_requests=True):
                    raise ValueError("the prefix cache could not be dropped")
            except Exception as error:  # the engine passes on whatever its workers raise
                reason = one_line(error, 300)
                self.refusing = f"{request.weights} did not arrive whole ({reason}); send a whole set"
                raise HTTPException(500, self.refusing) from error
            self.weights = request.weights
            self.refusing = None
            self.is_drained = False
            await self.engine.resume_generation()
            return Committed(weights=request.weights, digest=digests[0])

    def close(self) -> None:
        self._folder.remove()


def label(weights: Weights) -> str:
    """The version as vLLM notes it on completions."""
    return f"{weights.run}:{weights.version}"


async def while_alive(engine: Any, call: Awaitable[Answer]) -> Answer:
    """What `call` gives. An engine that dies never answers: then RuntimeError."""
    task = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({task}, timeout=ALIVE_CHECK_S))[0]:
            if engine.errored:
                raise RuntimeError("the engine died")
        return task.result()
    finally:
        task.cancel()


def memory_folder() -> str:
    """Where files live in memory; the folder for temporary files if there is no such place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
