"""What it means when a disk refuses: each library says it in its own words, or not at all. No torch."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from grpo_cli.errors import RunError, one_line

FULL = (errno.ENOSPC, errno.EDQUOT)

WORDS = {
    errno.ENOSPC: ("no space is left on the disk", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room"),
    errno.EFBIG: ("the file is larger than ulimit -f or the file system allows", "raise the limit"),
    errno.EROFS: ("the file system is read-only", "have it mounted for writing"),
    errno.EACCES: ("permission denied", "make it writable for this user"),
    errno.EPERM: ("permission denied", "make it writable for this user"),
    errno.ENOENT: ("it, or its folder, is gone", "find out what removes files of a run that is going on"),
    errno.ESTALE: ("it was removed on the file server", "find out what removes files of a run that is going on"),
    errno.EIO: ("the disk failed or was full", "look for its errors in the system's log, and make room"),
}
"""What an error number means to a user, and what to do."""

ERROR_NUMBER = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)
"""As safetensors and Arrow write it."""

TORCH_COULD_NOT_WRITE = re.compile(r"inline_container|PytorchStreamWriter|unexpected pos|file write failed")
PROBE_BYTES = 2**20


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what any library raises for a disk's refusal into an OSError with its number and the file's name."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _error_number(error, path)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(_place(error, path))) from error


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn the disk's refusal of a file in the run's folder into a message.

    Raises:
        RunError: that names the file and says what to do.
    """
    try:
        yield
    except OSError as error:
        is_ours = _place(error, Path(os.sep)).absolute().is_relative_to(folder.absolute())
        if not (error.errno in WORDS and is_ours) and error.errno not in FULL:
            raise
        raise RunError(f"{sentence(error, folder)}, then --resume") from error


def sentence(error: BaseException, place: Path) -> str:
    """What a disk refused, why, and what to do; `place` is named where the error names no file."""
    if not isinstance(error, OSError) or error.errno not in WORDS:
        return one_line(error)
    meaning, advice = WORDS[error.errno]
    name = _place(error, place)
    return f"{name}: {meaning}{_free(name) if error.errno == errno.ENOSPC else ''}; {advice}"


def _place(error: BaseException, otherwise: Path) -> Path:
    name = getattr(error, "filename", None)
    return otherwise if name is None or isinstance(name, int) else Path(os.fsdecode(name))


def _free(path: Path) -> str:
    try:
        room = os.statvfs(next(folder for folder in path.absolute().parents if folder.exists()))
    except OSError:
        return ""
    if not room.f_favail and room.f_files:
        return " (it has no room for another file's name)"
    return f" ({room.f_bavail * room.f_frsize / 1e6:.1f} MB are free)"


def _error_number(error: BaseException, path: Path) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    told = ERROR_NUMBER.search(str(error))
    if told:
        return int(told[1])
    return _probed(path.parent) if TORCH_COULD_NOT_WRITE.search(str(error)) else None


def _probed(folder: Path) -> int:
    """Why a file cannot be written to a folder, found by writing one: torch does not pass on the reason."""
    path = folder / f".probe-{os.getpid()}.partial"
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        path.unlink(missing_ok=True)
    return errno.EIO  # it was full for a moment, or failed
