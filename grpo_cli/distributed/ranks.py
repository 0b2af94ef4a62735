"""The processes that train together, and how they tell each other things.

What decides about a step (completions, rewards, whether to stop) is gathered as plain objects and is then the same
on every rank, so that everything that follows from it is computed alike everywhere and needs no reduction.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.rendezvous import rendezvous

from grpo_cli.distributed.environment import Placement, is_launched, placement
from grpo_cli.distributed.interfaces import address_between_nodes, interface_of
from grpo_cli.errors import EXPECTED_ERRORS, StoppedEarly

LONGEST_WAIT = timedelta(hours=2)
"""Ranks wait for each other's rollouts and rewards; one that is silent for longer is stuck."""

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable in which gloo looks for the name of the interface to use."""

T = TypeVar("T")


class Ranks:
    """This process among `world_size` processes; without arguments, a process alone.

    Args:
        rank: of this process, from 0.
        world_size: processes in all.
        device: of this process; where there are GPUs, the current one if none is given.
        talk: process group for objects and CPU tensors, if there are several processes.
        owns_group: whether the default process group is not a caller's.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        talk: Any = None,
        owns_group: bool = False,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device or current_device()
        self._talk = talk
        self._owns_group = owns_group

    @classmethod
    def join(cls, *, needs_group: bool) -> Ranks:
        """Meet the other processes that the launcher started.

        Args:
            needs_group: make a process group even for a process alone.
        """
        if not torch.cuda.is_available():
            # transformers imports DeepSpeed where it is installed, which then tells that it has found no GPU.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        place = placement(os.environ)
        if place.world_size == 1 and not needs_group:
            return cls()
        has_gpu = torch.cuda.is_available()
        if has_gpu and is_launched(os.environ):
            torch.cuda.set_device(place.local_rank)
        is_own = not dist.is_initialized()
        if is_own:
            # A process that no launcher started meets nobody, and needs no address for it.
            store = _meeting_point(place) if is_launched(os.environ) else HashStore()
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
                timeout=LONGEST_WAIT, store=store, rank=place.rank, world_size=place.world_size,
            )  # fmt: skip
        talk = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if place.world_size > 1 else None
        return cls(place.rank, place.world_size, current_device(), talk, is_own)

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """A run whose ranks wait for each other at its planned end: launchers kill what outlives the first."""
        try:
            yield
        except StoppedEarly:  # always of all ranks; other errors may be of one alone
            self._leave()
            raise
        self._leave()

    def _leave(self) -> None:
        if self._talk is not None:
            dist.barrier(self._talk)
            dist.destroy_process_group(None if self._owns_group else self._talk)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def owns(self, index: int) -> bool:
        """Whether this rank does what concerns item `index`, where nothing is known of the items' cost."""
        return index % self.world_size == self.rank

    def gather(self, value: T) -> list[T]:
        """What every rank gives, in the order of ranks."""
        if self._talk is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._talk)
        return values

    def tell(self, value: T | None = None) -> T:
        """What rank 0 gives; the argument of the others is not looked at."""
        values: list[Any] = [value]
        if self._talk is not None:
            dist.broadcast_object_list(values, src=0, group=self._talk)
        told: T = values[0]
        return told

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over ranks of CPU tensors of one shape; the argument is overwritten."""
        if self._talk is not None:
            dist.all_reduce(values, group=self._talk)
        return values

    @torch.no_grad()
    def copy_from_main(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give tensors the values that they have on rank 0; one at a time is twice on the device."""
        if self._talk is not None:
            for tensor in tensors:
                value = tensor.data.to(self.device).contiguous()
                dist.broadcast(value.view(-1).view(torch.uint8), src=0)  # whatever a backend knows of its dtype
                if value.data_ptr() != tensor.data_ptr():
                    tensor.data.copy_(value)

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank, in the order of ranks.

        Raises:
            UserError, RunError, StoppedEarly: that of the first rank on which it failed so, on all ranks alike.
        """
        return [_value(outcome) for outcome in self.gather(_outcome(work))]

    def led(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, which alone does it.

        Raises:
            UserError, RunError, StoppedEarly: as it raised there, on all ranks alike.
        """
        value: T = _value(self.tell(_outcome(work) if self.is_main else None))
        return value


def current_device() -> torch.device:
    """The GPU that this thread computes on, by its number, or the CPU where there is none.

    A device without a number is whatever is current in the thread that uses it, and each thread begins with GPU 0.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _meeting_point(place: Placement) -> Any:
    """The store that the launcher's variables lead to; between machines, gloo's interface is chosen through it.

    By itself gloo takes the address that this machine's own name stands for, which may be a loopback one.
    """
    store, _, _ = next(rendezvous("env://", timeout=LONGEST_WAIT))
    if place.world_size > place.local_world_size:
        address = address_between_nodes(place, os.environ["MASTER_ADDR"], store)
        interface = interface_of(address)
        if interface is not None and GLOO_INTERFACE not in os.environ:
            os.environ[GLOO_INTERFACE] = interface
            if place.local_rank == 0:
                print(f"{socket.gethostname()}: processes talk over {interface} ({address})", file=sys.stderr)
    return store


def _outcome(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except EXPECTED_ERRORS as error:
        return error


def _value(outcome: Any) -> Any:
    if isinstance(outcome, EXPECTED_ERRORS):
        raise outcome
    return outcome
