"""Temporary folders that go with the process that made them, also if it is killed: the next one removes them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

OWNER = "instance"
"""A file in the folder that its process holds a lock on, which ends with the process, however that ends."""


class OwnFolder:
    """A new folder that only this user can enter; those that killed processes have left beside it are removed.

    Args:
        prefix: of its name; says what it is for.
        parent: where it is made; the folder for temporary files if empty.
        note: what the file `OWNER` says, not empty.
    """

    def __init__(self, prefix: str, parent: str | None = None, note: str = "running") -> None:
        parent = parent or tempfile.gettempdir()
        sweep(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))  # mode 0700
        self.owner = self.path / OWNER
        self._owner_file = self.owner.open("w")
        fcntl.flock(self._owner_file, fcntl.LOCK_EX)
        self._owner_file.write(note)
        self._owner_file.flush()

    def remove(self) -> None:
        """Remove it; more than once is fine."""
        self._owner_file.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def sweep(parent: str, prefix: str) -> None:
    """Remove the folders of such a name whose processes have ended, if they are this user's."""
    for folder in Path(parent).glob(f"{prefix}*"):
        with suppress(OSError):
            if folder.lstat().st_uid != os.geteuid():
                continue
            with (folder / OWNER).open("r+") as owner:
                # A file that is still empty is of a process that makes its folder right now.
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if owner.read():
                    shutil.rmtree(folder)
