"""Which weights the server has, and whether they are whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from grpo_cli.serve import wire
from grpo_cli.serve.protocol import STAGING_FILE, BeginWeights, Committed, CommitWeights, Staging, Weights

TRANSFER_TIMEOUT_S = 300.0
"""Longest wait of a worker for the trainer's next bucket."""


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
        self._begun: BeginWeights | None = None
        self._lock = asyncio.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="grpo-serve-", dir=memory_folder()))  # mode 0700
        self.probe = self._folder / "instance"
        self.probe.write_text(self.instance)

    async def begin(self, request: BeginWeights) -> Staging:
        """Finish what is in flight, stop generating, and make room for a set of weights."""
        async with self._lock:
            self._begun = None
            self.refusing = f"{request.weights} of the weights is on its way"
            await self.engine.pause_generation(mode="wait")
            path = None
            if request.rendezvous is None:
                path = self._make_room(wire.total_bytes(wire.plan_buckets(request.tensors)))
            self._begun = request
            return Staging(path=path)

    def _make_room(self, size: int) -> str:
        path = self._folder / STAGING_FILE
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
                "timeout_s": TRANSFER_TIMEOUT_S,
            }
            if begun.rendezvous is None:
                update["path"] = str(self._folder / STAGING_FILE)
            else:
                update["rendezvous"] = begun.rendezvous.model_dump()
            start = time.perf_counter()
            try:
                digests = await self.engine.collective_rpc("load_weight_set", args=(update,))
                if len(set(digests)) != 1:
                    raise ValueError(f"the workers got different weights: digests {', '.join(digests)}")
                await self.engine.update_weight_version(label(request.weights))
                if not await self.engine.reset_prefix_cache(reset_running_requests=True):
                    raise ValueError("the prefix cache could not be dropped")
            except Exception as error:  # the engine passes on whatever its workers raise
                self.refusing = f"{request.weights} did not arrive whole ({_one_line(error)}); send a whole set"
                raise HTTPException(500, self.refusing) from error
            self.weights = request.weights
            self.refusing = None
            await self.engine.resume_generation()
            return Committed(weights=request.weights, digest=digests[0], seconds=time.perf_counter() - start)

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder)


def label(weights: Weights) -> str:
    """The version as vLLM notes it on completions."""
    return f"{weights.run}:{weights.version}"


def memory_folder() -> str | None:
    """Where files live in memory; the folder for temporary files if there is no such place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
