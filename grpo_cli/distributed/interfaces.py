"""Which of this machine's network interfaces leads to another machine. Nothing is sent; no torch import."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from grpo_cli.distributed.environment import Placement

DISCARD_PORT = 9
"""Port of the UDP sockets that ask for a route: connecting one sends nothing."""

MAIN_ADDRESS = "grpo/main_address"
"""Key in the processes' store: the address that another machine finds for machine 0."""


def address_towards(host: str) -> str:
    """This machine's address on the interface that leads to `host`, a name or an address.

    Raises:
        OSError: the name has no address, or nothing leads there.
    """
    return _route(host)[0]


def interface_of(address: str) -> str | None:
    """Name of the interface of this machine that has this address, or None."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def address_between_nodes(place: Placement, main: str, store: Any) -> str:
    """This machine's address on the interface that leads to machine 0, or on machine 0 to the others.

    On machine 0 its own name may stand for a loopback address, as Debian writes it into /etc/hosts. Then machine 0
    takes the address that another machine has found for it.

    Args:
        place: of this process; all processes call this.
        main: name or address of machine 0.
        store: that all processes see.

    Raises:
        OSError: the name has no address here, or nothing leads there.
    """
    own, found = _route(main)
    if place.rank != place.local_rank:  # not on machine 0
        if place.local_rank == 0:
            store.set(MAIN_ADDRESS, found)
        return own
    if ipaddress.ip_address(own).is_loopback:
        return store.get(MAIN_ADDRESS).decode()
    return own


def _route(host: str) -> tuple[str, str]:
    """This machine's address towards `host`, and that of `host`."""
    refused: OSError | None = None
    for family, kind, _, _, target in socket.getaddrinfo(host, DISCARD_PORT, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as probe:
                probe.connect(target)
                own, found = (name[0].partition("%")[0] for name in (probe.getsockname(), probe.getpeername()))
                return own, found
        except OSError as error:  # such as an IPv6 address, where no IPv6 leads anywhere
            refused = error
    raise refused or OSError(f"{host} has no address")
