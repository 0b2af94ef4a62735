"""A disk that forgets what was not synced, for what a power loss leaves of a run's folder.

While a run is on, what it syncs is noted: a file's contents at its last fsync, and the entries that a folder had
at its last fsync. After a kill the folder is made what a disk might hold then:

- A folder has the entries of its last fsync or of any moment since then. Entries of one folder change in the order
  in which the run changed them; those of two folders do not wait for each other.
- A file has the contents of its last fsync (none, if it never was synced), or the newest ones, or these up to some
  byte, after which it ends or holds zeros.

Which of these it is, is drawn for each file and folder. The model leaves out some of what may happen: the run's
folder itself is always there; what a process found when it began counts as synced; files that appear between two
of the calls that are noted appear at the same time; an older part of a file is never mixed with a newer one; and
a disk that says it has synced has done so.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Entries = dict[str, tuple[bool, int]]
"""Name to whether it is a folder, and the inode."""

ENTRY_CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir")


class Watch:
    """Notes in a process what its run makes durable.

    Files are held by further links, and folders by open descriptors, so that no inode is given to another file.
    """

    def __init__(self, run: Path, notes: Path) -> None:
        self.run = run
        self.held = notes / "held"
        self.synced = notes / "synced"
        self._seen: dict[int, Entries] = {}
        self._descriptors: dict[int, int] = {}
        self._log = os.open(notes / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._rename = os.rename

    def begin(self) -> None:
        """Note changes from now on."""
        self.look()
        fsync = os.fsync

        def noted_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.note_synced(descriptor)

        os.fsync = noted_fsync
        for name in ENTRY_CHANGES:
            setattr(os, name, self._looking_after(getattr(os, name)))

    def _looking_after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            self.look()
            result = function(*arguments, **options)
            self.look()
            return result

        return change

    def note_synced(self, descriptor: int) -> None:
        self.look()
        state = os.fstat(descriptor)
        if stat.S_ISDIR(state.st_mode):
            self._say("folder synced", state.st_ino)
        elif (self.held / str(state.st_ino)).exists():
            self.keep_contents(state.st_ino)

    def keep_contents(self, inode: int) -> None:
        """Remember what a file holds now; the process may be killed in here, too."""
        partial = self.synced / f"{inode}-{os.getpid()}-{threading.get_ident()}"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(descriptor, (self.held / str(inode)).read_bytes())
        os.close(descriptor)
        self._rename(partial, self.synced / str(inode))

    def look(self) -> None:
        """Note the folders whose entries have changed."""
        for inode, entries in entries_below(self.run, self._hold_folder):
            if self._seen.get(inode) == entries:
                continue
            for name, (is_folder, file) in entries.items():
                if not is_folder:
                    self._hold_file(inode, name, file)
            self._seen[inode] = entries
            self._say("entries", inode, entries)

    def _hold_folder(self, inode: int, path: str) -> None:
        if inode not in self._descriptors:
            self._descriptors[inode] = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def _hold_file(self, folder: int, name: str, inode: int) -> None:
        with suppress(FileExistsError, FileNotFoundError):  # held already, or gone again
            os.link(name, self.held / str(inode), src_dir_fd=self._descriptors[folder])

    def close(self) -> None:
        for descriptor in [self._log, *self._descriptors.values()]:
            os.close(descriptor)

    def _say(self, *words: Any) -> None:
        os.write(self._log, (json.dumps(words) + "\n").encode())


def entries_below(folder: Path, found: Callable[[int, str], None]) -> list[tuple[int, Entries]]:
    """The inode and the entries of a folder and of those in it; `found` is told the path of each."""
    below: list[tuple[int, Entries]] = []
    waiting = [str(folder)]
    while waiting:
        path = waiting.pop()
        try:
            inode = os.stat(path).st_ino
            found(inode, path)
            with os.scandir(path) as listing:
                entries = {entry.name: (entry.is_dir(), entry.inode()) for entry in listing}
        except FileNotFoundError:  # removed meanwhile
            continue
        below.append((inode, entries))
        waiting += [f"{path}/{name}" for name, (is_folder, _) in entries.items() if is_folder]
    return below


def start_watching(run: Path, notes: Path) -> None:
    """Take what a run's folder holds as synced, before the processes of the run begin to watch."""
    for name in ("held", "synced"):
        (notes / name).mkdir(parents=True)
    watch = Watch(run, notes)
    watch.look()
    for inode in watch._seen:
        watch._say("folder synced", inode)
    for file in watch.held.iterdir():
        watch.keep_contents(int(file.name))
    watch.close()


def lose_power(run: Path, notes: Path, rng: random.Random) -> None:
    """Make a run's folder what the disk may hold of it, after its processes were killed."""
    remembered = run.with_name(f"{run.name}-remembered")
    write_remembered(run, notes, rng, remembered)
    shutil.rmtree(run)
    remembered.rename(run)


def write_remembered(run: Path, notes: Path, rng: random.Random, target: Path) -> None:
    """Write what the disk may hold of a run's folder to another one."""
    last = Watch(run, notes)
    last.look()  # what came after the last change that was noted
    last.close()
    log = [json.loads(line) for line in (notes / "log").read_text().splitlines()]
    candidates: dict[int, list[Entries]] = {}
    for what, inode, *rest in log:
        if what == "entries":
            candidates.setdefault(inode, [{}]).append(rest[0])
        else:
            candidates[inode] = candidates.get(inode, [{}])[-1:]
    forgets_all = rng.random() < 0.5

    def build(inode: int, path: Path) -> None:
        path.mkdir()
        entries = candidates.get(inode, [{}])
        for name, (is_folder, child) in sorted((entries[0] if forgets_all else rng.choice(entries)).items()):
            if is_folder:
                build(child, path / name)
            else:
                (path / name).write_bytes(contents(child))

    def contents(inode: int) -> bytes:
        synced, held = last.synced / str(inode), last.held / str(inode)
        old = synced.read_bytes() if synced.exists() else b""
        new = held.read_bytes() if held.exists() else old
        if forgets_all or old == new:
            return old
        alike = next((i for i, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), len(old))
        kept = new[: rng.randint(min(alike, len(new)), len(new))]
        return rng.choice([old, new, kept, kept + bytes(len(new) - len(kept))])

    build(run.stat().st_ino, target)
