"""The lock on a run's folder: one run at a time writes there. No torch.

It is a POSIX record lock. The kernel releases it however the process ends. Children do not inherit it, so none of
them keeps it after the run has died. NFS takes it to the server, where it holds between machines. Its weakness is
that closing any descriptor of the file gives it up, which a callback that copies the folder would do: so the lock
is taken again before each checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from grpo_cli.errors import RunError, UserError

LOCK_FILE = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks answer."""

LAST_BREATH_S = 2.0
"""How long a lock is waited for: a process that was killed needs a moment to be gone."""

LEASE_S = 120.0
"""How long a resumed run waits for another machine's lock: an NFS server frees it only after its lease, 90 s by
default, where the machine vanished, and a scheduler starts the run again before that."""


class RunLock:
    """Holds the folder of a run until it is closed or this process ends.

    Args:
        folder: that is there.
        note: told where the file system has no locks.

    Raises:
        UserError: another process holds it.
        OSError: the lock file cannot be written.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder = folder
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._who = f"host {socket.gethostname()}, process {os.getpid()}, since {started}\n"
        self._descriptor = self._open()
        deadline = time.monotonic() + LAST_BREATH_S
        try:
            while not self._lock(note):
                if time.monotonic() > deadline:
                    raise in_use(folder)
                time.sleep(0.1)
            self._write(self._who)
        except BaseException:
            os.close(self._descriptor)
            raise

    def keep(self) -> None:
        """Take the lock again where it was lost.

        Raises:
            RunError: another process has taken it.
            OSError: the folder is gone.
        """
        try:
            is_same = os.path.samestat(os.fstat(self._descriptor), os.stat(self.folder / LOCK_FILE))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            opened = self._open()
            os.close(self._descriptor)
            self._descriptor = opened
        if not self._lock(lambda _: None):
            raise RunError(f"{in_use(self.folder)} This run ends, so that the two do not mix")
        if not is_same:
            self._write(self._who)

    def close(self) -> None:
        """Give the folder up; the lock file stays, since removing it would race with the next run."""
        with contextlib.suppress(OSError):
            self._write("")
        os.close(self._descriptor)

    def _open(self) -> int:
        return os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _lock(self, note: Callable[[str], None]) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                return False
            if error.errno not in UNSUPPORTED:
                raise
            note(f"{self.folder} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
        return True

    def _write(self, text: str) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


def holder(folder: Path) -> str | None:
    """Host, process and start of the run that holds a folder; None if none does. Nothing is written."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return _holder_of(file.read(500)) if error.errno in HELD else None
    except OSError:  # there is no such file
        return None
    return None


def wait_until_free(folder: Path, *, resume: bool, note: Callable[[str], None]) -> None:
    """Return once no run holds a folder; nothing is written.

    Raises:
        UserError: a run goes on holding it.
    """
    who = holder(folder)
    if who is None:
        return
    seconds = LAST_BREATH_S
    if resume and f"host {socket.gethostname()}, " not in who:
        seconds = LEASE_S
        note(f"{folder} is held by a run on another machine ({who}); waiting up to {seconds:.0f} s for its end")
    deadline = time.monotonic() + seconds
    while holder(folder) is not None:
        if time.monotonic() > deadline:
            raise in_use(folder)
        time.sleep(0.1)


def in_use(folder: Path) -> UserError:
    """The error of a start in a folder that another run holds."""
    try:
        who = _holder_of((folder / LOCK_FILE).read_bytes()[:500])
    except OSError:
        who = _holder_of(b"")
    return UserError(
        f"train.output_dir: {folder} is in use by a run that is going on ({who}). Wait for its end or stop it, or "
        "choose another folder with --set train.output_dir=..."
    )


def _holder_of(content: bytes) -> str:
    text = "".join(c for c in content.decode(errors="replace") if c.isprintable())
    return text.strip() or "it has not said who it is"
