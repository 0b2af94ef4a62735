"""What goes wrong with a link, and when: drawn from a seed, and counted in what passes over the link."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

TO_SERVER, TO_TRAINER = 0, 1
"""Directions."""

PLACES: dict[str, tuple[int, bytes, int]] = {
    "start": (TO_SERVER, b"", 1),
    "info": (TO_SERVER, b"GET /v1/grpo/info", 12),
    "generate": (TO_SERVER, b"POST /v1/grpo/generate", 14),
    "begin": (TO_SERVER, b"POST /v1/grpo/weights/begin", 4),
    "commit": (TO_SERVER, b"POST /v1/grpo/weights/commit", 4),
    "answer": (TO_TRAINER, b"HTTP/1.1 ", 28),
}
"""Where a fault begins: the direction, the bytes that show it, and how often an undisturbed run passes it."""

WEIGHTS = "weights"
"""A place too: a packet of the connections by which the server's worker fetches weights from the trainer."""

WEIGHT_PACKETS = 120
"""Such packets of an undisturbed run, at least."""

PACKET_KINDS = {
    "slow": "each packet arrives late, by a time that varies",
    "lossy": "packets are lost, doubled and overtaken",
    "thin": "few bytes a second",
    "cut": "nothing arrives for a while, and nobody is told",
    "one way": "nothing arrives in one direction for a while",
    "forgotten": "connections that are there carry nothing any more; new ones work",
    "reset": "both ends of each connection get a RST",
    "refused": "packets to the other side are answered with RST for a while",
    "unplugged": "the interface of one side is down for a while",
    "moved": "the trainer's address is replaced by another",
    "gone": "nothing arrives ever again in this run",
}
"""Faults of the packets, which hit every connection."""

RELAY_KINDS = {
    "late": "what is said waits in the relay for a moment, each time",
    "broken off": "a connection is closed in the middle of a message",
    "broken off hard": "it is reset in the middle of a message",
    "swallowed": "the rest of a message never comes, and its connection stays open",
    "stalled": "it comes after a while",
    "trickling": "it comes in pieces of a few bytes",
    "bad gateway": "the relay answers by itself, with 502, for a while",
    "relay gone": "the relay takes no connection any more in this run",
}
"""Faults of a relay in front of the server, which hit HTTP alone."""

FOR_THE_RUN = {"slow", "lossy", "thin", "late"}
"""Kinds that hold from the beginning to the end of a run."""

FOR_EVER = {"gone", "relay gone"}
"""Kinds that only another start of the run finds mended."""

ONE_MESSAGE = {"forgotten", "reset", "moved", "broken off", "broken off hard", "swallowed", "trickling"}
"""Kinds that have no length."""


@dataclass(frozen=True)
class Fault:
    kind: str
    place: str
    nth: int
    """Which passing of the place."""
    wait_s: float
    """From there to the fault."""
    lasts_s: float
    amount: float
    """0 to 1, of whatever the kind has more or less of."""

    def __str__(self) -> str:
        if self.kind in FOR_THE_RUN:
            return f"{self.kind} ({self.amount:.2f})"
        length = "" if self.kind in ONE_MESSAGE | FOR_EVER else f" for {self.lasts_s:.1f} s"
        place = self.place if self.place == "start" else f"{self.place} {self.nth}"
        return f"{self.kind}{length} at {place}" + (f" + {self.wait_s:.1f} s" if self.wait_s else "")


@dataclass(frozen=True)
class Schedule:
    number: int
    layer: Literal["packets", "relay"]
    transfers: Literal["memory", "network"]
    faults: tuple[Fault, ...]

    @property
    def away_s(self) -> float:
        """How long the server cannot be reached, at most; endless if it never comes back."""
        if any(fault.kind in FOR_EVER for fault in self.faults):
            return float("inf")
        return sum(f.lasts_s for f in self.faults if f.kind not in ONE_MESSAGE | FOR_THE_RUN)


def draw(seed: int, number: int, timeout_s: float) -> Schedule:
    """The schedule of this number. Successive ones go through all kinds, each with both ways of transfer.

    Args:
        seed, number: all follows from these.
        timeout_s: of the run; faults last from a part of it to more than twice as long.
    """
    rng = random.Random(f"{seed}/{number}")
    kinds = [*PACKET_KINDS, *RELAY_KINDS]
    first = kinds[number % len(kinds)]
    layer: Literal["packets", "relay"] = "packets" if first in PACKET_KINDS else "relay"
    transfers: Literal["memory", "network"] = "network" if sum(divmod(number, len(kinds))) % 2 else "memory"
    own = [kind for kind in (PACKET_KINDS if layer == "packets" else RELAY_KINDS) if kind not in FOR_EVER]
    more = [] if first in FOR_EVER else rng.choices(own, k=rng.choice([0, 0, 1, 2]))
    places = [*PLACES, WEIGHTS] if transfers == "network" and layer == "packets" else [*PLACES]
    faults = [_fault(rng, kind, places, timeout_s) for kind in dict.fromkeys([first, *more])]
    return Schedule(number, layer, transfers, tuple(faults))


def _fault(rng: random.Random, kind: str, places: list[str], timeout_s: float) -> Fault:
    lasts = rng.uniform(0.3, timeout_s / 2) if rng.random() < 0.6 else rng.uniform(timeout_s, 2.5 * timeout_s)
    place = "start" if kind in FOR_THE_RUN else rng.choice(places)
    passings = WEIGHT_PACKETS if place == WEIGHTS else PLACES[place][2]
    wait = rng.choice([0.0, 0.0, rng.uniform(0, 1)])
    if kind in FOR_THE_RUN:
        wait, lasts = 0.0, float("inf")
    return Fault(kind, place, rng.randint(1, passings), wait, lasts, rng.random())


@dataclass
class Script:
    """A schedule's faults on their way: told what passes, it says what begins."""

    faults: list[Fault]
    begun: list[Fault] = field(default_factory=list)
    """Those that came about."""
    _passed: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def seen(self, direction: int, data: bytes, *, of_weights: bool = False) -> list[Fault]:
        """Faults that begin with these bytes, or `wait_s` later."""
        with self._lock:
            if of_weights:
                self._passed[WEIGHTS] += 1
            for place, (way, sign, _) in PLACES.items():
                if way == direction and data.startswith(sign) and not of_weights:
                    self._passed[place] += 1
            due = [f for f in self.faults if f not in self.begun and self._passed[f.place] >= self._nth(f)]
            self.begun += due
            return due

    def _nth(self, fault: Fault) -> int:
        return 1 if fault.place == "start" else fault.nth
