"""Networks of their own for trainer and server, each with one device that leads out of it.

They have no names, so nothing is left of them when the processes in them have ended, however that happens.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
DEVICE = "wire0"

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace, and the thread of this process that lives in it.

    Args:
        address: of its device, with the length of the prefix.
    """

    def __init__(self, address: str) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.path, self.tun = self.run(_make, address)

    def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """What `call(*arguments)` gives inside. Processes that it starts, and their sockets, stay inside."""
        return self._thread.submit(call, *arguments).result()

    def ip(self, *arguments: str) -> None:
        self.run(_ip, *arguments)

    def close(self) -> None:
        self._thread.shutdown()
        os.close(self.tun)


def enter(path: str) -> None:
    """Move this thread into the namespace at `path`; the threads and processes that it starts follow."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _check(_libc.setns(descriptor, CLONE_NEWNET))
    finally:
        os.close(descriptor)


def why_not() -> str | None:
    """Why there are no namespaces with such devices for this process, if so."""
    try:
        Namespace("10.77.9.1/24").close()
    except OSError as error:
        return f"no network namespaces for this user: {error}"
    except subprocess.CalledProcessError as error:
        return f"no addresses in a network namespace: {error.stderr.strip()}"
    return None


def _make(address: str) -> tuple[str, int]:
    """Runs in the thread of the namespace: its path, and the file by which packets leave and enter it."""
    _check(_libc.unshare(CLONE_NEWNET))
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    _ip("link", "set", "lo", "up")
    _ip("addr", "add", address, "dev", DEVICE)
    _ip("link", "set", DEVICE, "up")
    return f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net", tun


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
