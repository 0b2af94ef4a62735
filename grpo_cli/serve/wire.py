"""How weights lie in a buffer on their way to the server: the same arithmetic on both sides. No vLLM."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from grpo_cli.serve.protocol import TensorSpec

dist: Any = torch.distributed  # its types leave out what this module is built on
TCPStore = dist.TCPStore

ALIGNMENT = 64
"""Bytes; a tensor may be viewed in any dtype where it starts, and be summed up in words of eight."""

FIND_TIMEOUT_S = 20.0
"""How long torch goes on trying to connect, even if the other machine answers that nobody listens."""

BUCKET_BYTES = 64 * 2**20
"""Of a buffer that travels at once; a single larger tensor is a bucket of its own."""


@dataclass(frozen=True)
class Slot:
    """A tensor's place in its bucket."""

    spec: TensorSpec
    start: int
    """Byte within the bucket."""
    size: int
    """Bytes, without the padding up to the next tensor."""

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.spec.dtype)
        return dtype

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor within its bucket's bytes."""
        return flat[self.start : self.start + self.size].view(self.dtype).view(self.spec.shape)


@dataclass(frozen=True)
class Bucket:
    slots: list[Slot]
    start: int
    """Byte within the whole set."""
    size: int
    """Bytes, padding included."""

    @property
    def names(self) -> list[str]:
        return [slot.spec.name for slot in self.slots]


def plan_buckets(specs: Sequence[TensorSpec], bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Lay tensors out one after the other, in buckets of about `bucket_bytes`."""
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    start = size = 0
    for spec in specs:
        num_bytes = math.prod(spec.shape) * getattr(torch, spec.dtype).itemsize
        padded = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if slots and size + padded > bucket_bytes:
            buckets.append(Bucket(slots, start, size))
            slots, start, size = [], start + size, 0
        slots.append(Slot(spec, size, num_bytes))
        size += padded
    return [*buckets, Bucket(slots, start, size)] if slots else buckets


def total_bytes(buckets: Sequence[Bucket]) -> int:
    """Bytes of a whole set, padding included."""
    return sum(bucket.size for bucket in buckets)


@torch.no_grad()
def fill(bucket: Bucket, flat: torch.Tensor, tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Write a bucket's tensors into its (size,) bytes, in the dtype of the wire."""
    for slot in bucket.slots:
        tensor = tensor_of(slot.spec.name)
        if list(tensor.shape) != slot.spec.shape:
            raise ValueError(
                f"{slot.spec.name} has shape {list(tensor.shape)}, not {slot.spec.shape} as announced"
            )
        slot.view(flat).copy_(tensor)
        flat[slot.start + slot.size : -(-(slot.start + slot.size) // ALIGNMENT) * ALIGNMENT].zero_()


def tensors_in(bucket: Bucket, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and view of each tensor of a bucket."""
    for slot in bucket.slots:
        yield slot.spec.name, slot.view(flat)


class Digest:
    """A fingerprint of a set of weights as it travels: names, dtypes, shapes, and each tensor's words summed up.

    It finds what goes wrong in a transfer (bytes missing, stale or another tensor's), at the speed of memory and
    on the device where the bytes are. It is no defence against a forger: the key is.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: list[torch.Tensor] = []

    def add(self, bucket: Bucket, flat: torch.Tensor) -> None:
        words = flat.view(torch.int64)
        for slot in bucket.slots:
            spec = slot.spec
            self._names.append(f"{spec.name} {spec.dtype} {spec.shape}")
            end = -(-(slot.start + slot.size) // ALIGNMENT) * ALIGNMENT
            self._sums.append(words[slot.start // 8 : end // 8].sum())  # wraps around, which is fine

    def hexdigest(self) -> str:
        sums = torch.stack(self._sums).tolist() if self._sums else []
        lines = "\n".join(f"{name} {total}" for name, total in zip(self._names, sums, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()[:DIGEST_BYTES]


DIGEST_BYTES = 32
"""Characters of a hexadecimal digest, and bytes of the message that carries it."""


def find_sender(host: str, port: int, timeout_s: float) -> Any:
    """The store of rank 0, which listens before anybody is told to come.

    Args:
        host, port: of rank 0.
        timeout_s: of what is asked of the store.

    Raises:
        torch.distributed.DistNetworkError: nobody listens there, or not any more.
    """
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=FIND_TIMEOUT_S))
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def join_group(
    backend: str, store: Any, rank: int, world_size: int, host: str, timeout_s: float, device: torch.device
) -> Any:
    """A process group of its own, beside whatever default group this process is in.

    Args:
        backend: gloo or nccl.
        store: where the ranks find each other.
        rank: of this process; 0 sends.
        world_size: the trainer and every worker.
        host: address of the interface that gloo uses.
        timeout_s: of the rendezvous and of each broadcast.
        device: of this process, for nccl.
    """
    group = make_group(backend, store, rank, world_size, host, timeout_s)
    connect(group, backend, device)
    return group


def make_group(backend: str, store: Any, rank: int, world_size: int, host: str, timeout_s: float) -> Any:
    """The first half of `join_group`, after which there is something that can be left."""
    timeout = timedelta(seconds=timeout_s)
    if backend == "nccl":
        nccl = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timeout
        with _blocking_wait():
            return nccl(store, rank, world_size, options)
    gloo = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._threads = 2
    options._devices = [gloo.create_device(hostname=host)]
    return gloo(store, rank, world_size, options)


def connect(group: Any, backend: str, device: torch.device) -> None:
    """NCCL's ranks connect at the first message, which must come while the environment is right for it."""
    if backend == "nccl":
        broadcast(group, torch.zeros(1, dtype=torch.uint8, device=device))


_one_at_a_time = threading.Lock()


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """Inside, a group is made whose broken transfer raises in the thread that waits, and does not end the process.

    A group reads this as it is made, from the environment alone: `ProcessGroupNCCL.Options` has no such field. It
    must not stay: it would hold for training's groups too, and for programs that this process starts.
    """
    name = "TORCH_NCCL_BLOCKING_WAIT"
    with _one_at_a_time:  # each server is sent weights from a thread of its own
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def broadcast(group: Any, flat: torch.Tensor) -> None:
    """Send `flat` from rank 0 into everybody else's."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([flat], options).wait()
