"""A link of two networks that carries their packets one by one, and does to them what real links do.

The kernels at both ends are the real ones: they acknowledge, time out and send again.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tests.links.namespaces import DEVICE, Namespace
from tests.links.schedules import TO_SERVER, TO_TRAINER, Fault, Script

TRAINER, SERVER = "10.77.0.1", "10.77.0.2"
MOVED = "10.77.0.{}"
PREFIX = 24

FIN, SYN, RST, ACK = 1, 2, 4, 16
FIRST_MOVED, LAST_MOVED = 10, 250
BOTH = frozenset((TO_SERVER, TO_TRAINER))

Flow = tuple[bytes, int, int]
"""Address of the trainer, its port, the server's."""


@dataclass(frozen=True)
class Segment:
    """What a TCP packet says."""

    flow: Flow
    seq: int
    ack: int
    flags: int
    data: bytes

    @property
    def following(self) -> int:
        """The number of the byte after it."""
        return (self.seq + len(self.data) + bool(self.flags & SYN) + bool(self.flags & FIN)) % 2**32


@dataclass
class State:
    """What the link does to packets at present."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = float("inf")
    cut: list[frozenset[int]] = field(default_factory=list)
    """Directions in which nothing arrives, of each fault that lasts."""
    refuses: int = 0
    """Faults that last and answer with RST."""
    forgotten: set[Flow] = field(default_factory=set)
    free_at: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """When each direction has sent what it was given."""


class PacketLink:
    """Carries packets in a thread of its own until it is closed."""

    def __init__(self) -> None:
        self.trainer, self.server = Namespace(f"{TRAINER}/{PREFIX}"), Namespace(f"{SERVER}/{PREFIX}")
        self.address = TRAINER
        self._moves = itertools.cycle(range(FIRST_MOVED, LAST_MOVED))
        self._ends = [self.trainer.tun, self.server.tun]  # a packet to the server comes out of the first
        self._wake, self._woken = os.pipe()
        self._over = False
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._rng = random.Random(0)
        self._web_port = 0
        self._sent: dict[Flow, list[int]] = {}
        """By connection, the number of the byte that each end expects next."""
        self._state, self._script = State(), Script([])
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def begin(self, script: Script, seed: int, web_port: int) -> None:
        """Be a good link, until the script says otherwise.

        Args:
            web_port: of the server; connections to it are told from those that carry weights.
        """
        self._call(partial(self._begin, script, seed, web_port))
        for side in (self.trainer, self.server):
            side.ip("link", "set", DEVICE, "up")

    def close(self) -> None:
        self._over = True
        os.write(self._woken, b".")
        self._thread.join()
        self.trainer.close()
        self.server.close()
        os.close(self._wake)
        os.close(self._woken)

    def _call(self, action: Callable[[], None]) -> None:
        """Do it in the link's thread, and wait for that."""
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        heapq.heappush(self._due, (0.0, next(self._count), act))
        os.write(self._woken, b".")
        assert done.wait(10)

    def _begin(self, script: Script, seed: int, web_port: int) -> None:
        self._due.clear()
        self._sent.clear()
        self._state, self._script = State(), script
        self._rng, self._web_port = random.Random(seed), web_port

    # The thread

    def _carry(self) -> None:
        poll = select.poll()
        for descriptor in (*self._ends, self._wake):
            poll.register(descriptor, select.POLLIN)
        while not self._over:
            pause = self._due[0][0] - time.monotonic() if self._due else 1.0
            for descriptor, _ in poll.poll(max(0.0, min(1.0, pause)) * 1000):
                if descriptor == self._wake:
                    os.read(self._wake, 4096)
                    continue
                direction = self._ends.index(descriptor)
                with contextlib.suppress(OSError):  # no more of them, or the interface is down
                    while True:
                        self._take(direction, os.read(descriptor, 65536))
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._count), action))

    def _take(self, direction: int, packet: bytes) -> None:
        segment = parse(direction, packet)
        if segment is None:
            return  # the kernels' own talk of neighbours and routers
        of_weights = segment.flow[2] != self._web_port
        for fault in self._script.seen(direction, segment.data, of_weights=of_weights):
            self._at(time.monotonic() + fault.wait_s, partial(self._start, fault))
        while self._due and self._due[0][0] <= time.monotonic():  # a fault that begins now hits this packet
            heapq.heappop(self._due)[2]()
        state, rng = self._state, self._rng
        if state.refuses and not segment.flags & RST:
            self._answer_with_reset(direction, segment)
            return
        if segment.flow in state.forgotten or any(direction in cut for cut in state.cut):
            return
        if rng.random() < state.loss:
            return
        now = time.monotonic()
        state.free_at[direction] = max(now, state.free_at[direction]) + len(packet) / state.bytes_per_s
        late = state.delay_s + rng.uniform(0, state.jitter_s)
        for _ in range(1 + (rng.random() < state.loss / 2)):  # the network may double what it carries
            self._at(state.free_at[direction] + late, partial(self._deliver, direction, packet, segment))

    def _deliver(self, direction: int, packet: bytes, segment: Segment) -> None:
        self._sent.setdefault(segment.flow, [0, 0])[direction] = segment.following
        with contextlib.suppress(OSError):  # the interface is down
            os.write(self._ends[1 - direction], packet)

    def _start(self, fault: Fault) -> None:
        state, end = self._state, time.monotonic() + fault.lasts_s
        match fault.kind:
            case "slow":
                state.delay_s = state.jitter_s = 0.01 + 0.07 * fault.amount
            case "lossy":
                state.loss, state.jitter_s = 0.01 + 0.07 * fault.amount, 0.005
            case "thin":
                state.bytes_per_s = 100e3 + 400e3 * fault.amount
            case "cut" | "gone" | "one way":
                directions = frozenset([int(2 * fault.amount)]) if fault.kind == "one way" else BOTH
                state.cut.append(directions)
                if fault.kind != "gone":
                    self._at(end, partial(state.cut.remove, directions))
            case "forgotten":
                state.forgotten |= self._sent.keys()
            case "reset":
                for flow, (from_trainer, from_server) in self._sent.items():
                    os.write(self._ends[1], reset(TO_SERVER, flow, from_trainer, from_server))
                    os.write(self._ends[0], reset(TO_TRAINER, flow, from_server, from_trainer))
            case "refused":
                state.refuses += 1
                self._at(end, self._stop_refusing)
            case "unplugged":
                side = self.trainer if fault.amount < 0.5 else self.server
                side.ip("link", "set", DEVICE, "down")
                self._at(end, partial(side.ip, "link", "set", DEVICE, "up"))
            case "moved":
                old, self.address = self.address, MOVED.format(next(self._moves))
                # In this order: with a network's first address its others would go.
                self.trainer.ip("addr", "del", f"{old}/{PREFIX}", "dev", DEVICE)
                self.trainer.ip("addr", "add", f"{self.address}/{PREFIX}", "dev", DEVICE)

    def _stop_refusing(self) -> None:
        self._state.refuses -= 1

    def _answer_with_reset(self, direction: int, segment: Segment) -> None:
        answer = reset(1 - direction, segment.flow, segment.ack, segment.following)
        with contextlib.suppress(OSError):
            os.write(self._ends[direction], answer)


def parse(direction: int, packet: bytes) -> Segment | None:
    """What a packet says, if it is TCP over IPv4."""
    if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
        return None
    start = 4 * (packet[0] & 15)
    source, target, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", packet, start)
    data = packet[start + 4 * (offset >> 4) :]
    address = packet[12:16] if direction == TO_SERVER else packet[16:20]
    ports = (source, target) if direction == TO_SERVER else (target, source)
    return Segment((address, *ports), seq, ack, flags, data)


def reset(direction: int, flow: Flow, seq: int, ack: int) -> bytes:
    """A packet that ends a connection, as if the other end had sent it."""
    trainer, trainer_port, server_port = flow
    addresses, ports = (trainer, socket.inet_aton(SERVER)), (trainer_port, server_port)
    if direction == TO_TRAINER:
        addresses, ports = addresses[::-1], ports[::-1]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0, *addresses)
    tcp = struct.pack("!HHIIBBHHH", *ports, seq, ack, 5 << 4, RST | ACK, 0, 0, 0)
    pseudo = struct.pack("!4s4sBBH", *addresses, 0, socket.IPPROTO_TCP, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + tcp


def checksum(data: bytes) -> int:
    """That of RFC 1071, of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
