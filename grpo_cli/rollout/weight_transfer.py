"""How the policy's weights get to a server: through memory that both see, or by a process group."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from grpo_cli.launch.interfaces import address_towards
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.serve import wire
from grpo_cli.serve.protocol import Rendezvous, ServerInfo


def shares_memory(info: ServerInfo) -> bool:
    """Whether the server's folder is on this machine, and nobody but this user can have made it or enter it."""
    probe = Path(info.memory_probe)
    try:
        status = probe.parent.lstat()
        is_ours = status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode)
        return is_ours and not status.st_mode & 0o077 and probe.read_text() == info.instance
    except (OSError, ValueError):
        return False


def fill_memory(path: str, buckets: Sequence[wire.Bucket], policy: PolicyWeights) -> str:
    """Write the whole set into the server's staging file; return its digest.

    Raises:
        RuntimeError: the file is not there any more.
    """
    digest = wire.Digest()
    flat = torch.from_file(path, shared=True, size=wire.total_bytes(buckets), dtype=torch.uint8)
    for bucket in buckets:
        part = flat[bucket.start : bucket.start + bucket.size]
        with policy.gathered(bucket.names) as tensor:
            wire.fill(bucket, part, tensor)
        digest.add(bucket, part)
    return digest.hexdigest()


class SendingGroup:
    """A process group with the workers of one server, in which this process is rank 0.

    Args:
        url: of the server.
        backend: gloo or nccl.
        info: of the server; the group ends with this instance of it.
        timeout_s: of the rendezvous and of each broadcast.

    Raises:
        OSError: nothing leads to the server.
    """

    def __init__(self, url: str, backend: Any, info: ServerInfo, timeout_s: float) -> None:
        self.instance = info.instance
        self.timeout_s = timeout_s
        self.host = address_towards(urlsplit(url).hostname or "")
        self.group: Any = None
        # Bound to the one address that leads to the server, not to all of this machine's.
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.create_server((self.host, 0), family=family)
        port, world_size = listener.getsockname()[1], 1 + info.world_size
        self.store = wire.TCPStore(
            self.host, port, world_size, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s), master_listen_fd=listener.detach(),
        )  # fmt: skip
        self.rendezvous = Rendezvous(
            backend=backend, host=self.host, port=port, world_size=world_size, group=secrets.token_hex(8)
        )

    def start_sending(self, buckets: Sequence[wire.Bucket], policy: PolicyWeights) -> Sending:
        """Begin to send a whole set, while the server is asked to receive it."""
        sending = Sending(self, buckets, policy)
        sending.start()
        return sending


class Sending(threading.Thread):
    """One set of weights on its way; a daemon, since workers that hang must not keep an ending process alive."""

    def __init__(self, group: SendingGroup, buckets: Sequence[wire.Bucket], policy: PolicyWeights) -> None:
        super().__init__(daemon=True)
        self._group = group
        self._buckets = buckets
        self._policy = policy
        self._digest = wire.Digest()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._send()
        except Exception as error:  # told by whoever waits for the server's answer
            self.error = error
            self._group.group = None  # out of it, so that workers do not wait for the rest

    def _send(self) -> None:
        rendezvous = self._group.rendezvous
        device = self._policy.device if rendezvous.backend == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has a current device of its own
        if self._group.group is None:
            self._group.group = wire.join_group(
                rendezvous.backend, self._group.store, 0, rendezvous.world_size, self._group.host,
                self._group.timeout_s,
            )  # fmt: skip
        for bucket in self._buckets:
            flat = torch.empty(bucket.size, dtype=torch.uint8, device=device)
            with self._policy.gathered(bucket.names) as tensor:
                wire.fill(bucket, flat, tensor)
            self._digest.add(bucket, flat)
            wire.broadcast(self._group.group, flat)
        message = torch.tensor(list(self._digest.hexdigest().encode()), dtype=torch.uint8, device=device)
        wire.broadcast(self._group.group, message)

    def digest(self) -> str:
        """Of what was sent, once all of it was."""
        self.join()
        if self.error is not None:
            raise self.error
        return self._digest.hexdigest()
