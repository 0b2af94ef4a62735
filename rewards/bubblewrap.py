"""A world of its own for a program: bubblewrap's command line, where bubblewrap is installed and works.

The program then has no network, none of the machine's other processes, and of its files only those that
Python needs, which it cannot change. What it writes goes to memory, up to a limit, and is gone afterwards.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WORKDIR = "/tmp"
"""The one folder in there, beside `/dev/shm`, that can be written to."""

SCRIPTS = "/sandbox/rewards"
"""Where the scripts that run in there are."""

_WRITABLE_BYTES = 64 * 1024 * 1024
_SHARED_MEMORY_BYTES = 16 * 1024 * 1024
_PROBE_S = 30.0
# Users that hardly anybody is. Each run is one of its own, so that Linux counts its processes alone.
_USERS = range(40_000, 60_000)

_SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime")


@dataclass(frozen=True)
class Bubblewrap:
    """How to start a program in a world of its own."""

    command: tuple[str, ...]
    """What comes before the program's command line."""
    drops_root: bool
    """It starts as root, so that it can become a user that nobody else is; else it stays who starts it."""

    def uid(self) -> int | None:
        """The user that the program becomes once it has started."""
        return random.SystemRandom().choice(_USERS) if self.drops_root else None


@functools.cache
def bubblewrap() -> Bubblewrap | str:
    """How to start programs with bubblewrap, or the reason why that does not work. Tried out once."""
    if sys.platform != "linux":
        return "bubblewrap is for Linux only"
    executable = shutil.which("bwrap")
    if executable is None:
        return "bubblewrap is not installed (Debian's package bubblewrap has the program bwrap)"
    ways = [_way(executable, drops_root=False)]
    if os.getuid() == 0:
        # Root is held to no number of processes, also where it seems to be someone else.
        ways.insert(0, _way(executable, drops_root=True))
    said = ""
    for way in ways:
        become = f"import os; os.setgroups([]); os.setgid({way.uid()}); os.setuid({way.uid()})"
        code = f"{become if way.drops_root else ''}\nimport socket, subprocess"
        command = [*way.command, sys.executable, "-I", "-c", code]
        try:
            tried = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            continue
        if tried.returncode == 0:
            return way
        said = tried.stderr.decode(errors="replace").strip()[-300:] or f"exit code {tried.returncode}"
    return f"bubblewrap is installed but does not work here: {said}"


def _way(executable: str, *, drops_root: bool) -> Bubblewrap:
    command = [executable, "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    if drops_root:
        command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-all", "--unshare-user", "--cap-drop", "ALL"]
    for folder in _SYSTEM_FOLDERS:
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind-try", folder, folder]
    command += _empty(WORKDIR, _WRITABLE_BYTES)  # first, as Python may be in a folder of it
    # Those that bubblewrap makes on the way are for root alone.
    above = {folder for path in [*_SYSTEM_FILES, *_python_folders(), SCRIPTS] for folder in Path(path).parents}
    for passed in sorted({*above, Path(SCRIPTS)} - {Path("/")}):
        command += ["--perms", "0755", "--dir", str(passed)]
    for path in [*_SYSTEM_FILES, *_python_folders()]:
        command += ["--ro-bind-try", path, path]
    here = Path(__file__).resolve().parent
    for name in ("sandbox_child.py", "sandbox_crossing.py", "sandbox_remote.py"):
        command += ["--ro-bind", str(here / name), f"{SCRIPTS}/{name}"]
    command += ["--proc", "/proc", "--dev", "/dev", *_empty("/dev/shm", _SHARED_MEMORY_BYTES)]
    # What is left of bubblewrap's own file system has no size.
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORKDIR]
    return Bubblewrap(tuple(command), drops_root)


def _empty(folder: str, size: int) -> list[str]:
    """A folder in memory, of so many bytes at most."""
    return ["--perms", "1777", "--size", str(size), "--tmpfs", folder]


def _python_folders() -> list[str]:
    """Where this interpreter and its packages are, as far as they are not among the system's folders."""
    interpreter = Path(os.path.realpath(sys.executable))
    folders = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, str(interpreter.parents[1])]
    folders += os.environ.get("LD_LIBRARY_PATH", "").split(":")
    found: list[str] = []
    for folder in folders:
        if not os.path.isabs(folder):
            continue
        for path in (os.path.normpath(folder), os.path.realpath(folder)):
            if path not in found and not Path(path).is_relative_to("/usr") and path != "/":
                found.append(path)
    return found
