"""Who may use a rollout server: the key file, and the lock that asks every request for its key.

The server loads weights and runs prompts for whoever reaches it, so the lock fails closed: what it does not
recognise, it refuses. No torch, vLLM or web framework import.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import stat
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from grpo_cli.errors import UserError

# The types of ASGI, as Starlette spells them.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MIN_KEY_CHARS = 16
MAX_KEY_BYTES = 4096
"""Well below the 64 KiB at which web servers refuse a request's headers."""

REFUSED = b'{"detail": "this server needs its key, sent as Authorization: Bearer KEY"}'
WEBSOCKET_POLICY_VIOLATION = 1008


class Lock:
    """ASGI middleware that lets a request through only with `Authorization: Bearer KEY`.

    It must be the outermost one, around the whole app: then it decides before any route, mounted app or CORS
    answer. Only GET and HEAD of `/health` are open, for load balancers. With no key, everything is.

    Raises ValueError if the key is empty, since a request could hold it by accident.
    """

    def __init__(self, app: App, key: str | None) -> None:
        if key == "":
            raise ValueError("an empty key locks nothing; pass None for a server without a key")
        self.app = app
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the connection on or refuse it. Raises ValueError for a kind that it cannot check."""
        kind = scope["type"]
        if self.key is None or kind == "lifespan" or (kind == "http" and _is_health(scope)):
            await self.app(scope, receive, send)
        elif kind not in ("http", "websocket"):
            raise ValueError(f"the lock knows no connections of type {kind!r}")
        elif _holds(scope, self.key):
            await self.app(scope, receive, send)
        elif kind == "websocket":
            # Closing what was never accepted makes the web server answer the handshake with 403.
            await send({"type": "websocket.close", "code": WEBSOCKET_POLICY_VIOLATION, "reason": ""})
        else:
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(REFUSED)).encode()),
                (b"www-authenticate", b"Bearer"),
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSED})


def _is_health(scope: Scope) -> bool:
    """Whether this is exactly the open path, as the client wrote it and as the app will route it."""
    path = "/health"
    return (
        scope["method"] in ("GET", "HEAD")
        and scope["path"] == path
        # `path` is decoded, so it alone would also open /%68ealth. A server may leave `raw_path` out.
        and scope.get("raw_path") in (None, path.encode())
        # Under the root path /health, Starlette would route this request to "/" instead.
        and not scope.get("root_path")
    )


def _holds(scope: Scope, key: bytes) -> bool:
    """Whether the request's only Authorization header is `Bearer KEY`; header bytes are never decoded."""
    values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    if len(values) != 1:  # proxies disagree on which of two counts
        return False
    scheme, _, given = values[0].partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given, key)


def read_key(path: str | os.PathLike[str]) -> str:
    """The key in a file, less one newline at its end.

    Raises UserError, which never quotes the key, if the file is missing, unreadable or no regular file, if others
    than its owner can use it, or if what it holds is no key: too short, too long, or not one word of ASCII.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode  # of what was opened, not of what may have replaced it since
            if not stat.S_ISREG(mode):
                raise UserError(f"key file {path} is not a regular file")
            if mode & 0o077:
                raise UserError(f"key file {path} is open to other users; run: chmod 600 {path}")
            content = file.read(MAX_KEY_BYTES + len(b"\r\n") + 1)
    except IsADirectoryError as error:
        raise UserError(f"key file {path} is a folder; name a file in it") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no key file {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error  # without the number and path that an OSError adds
        raise UserError(f"cannot read key file {path}: {reason}") from error
    key = content.removesuffix(b"\n").removesuffix(b"\r") if content.endswith(b"\n") else content
    if not key:
        raise UserError(f"key file {path} is empty")
    if len(key) > MAX_KEY_BYTES:
        raise UserError(f"key file {path} holds more than {MAX_KEY_BYTES} characters; is it a key?")
    # A header has no encoding that all clients agree on beyond ASCII, and a space would end the key early.
    if not all(ord("!") <= byte <= ord("~") for byte in key):
        raise UserError(
            f"key file {path} must hold one line of printable ASCII characters without spaces; "
            "this one holds others"
        )
    if len(key) < MIN_KEY_CHARS:
        raise UserError(f"the key in {path} has {len(key)} characters; it needs at least {MIN_KEY_CHARS}")
    return key.decode("ascii")


def make_key_file(path: str | os.PathLike[str]) -> str:
    """Write a fresh key to a new file that only its owner can read, or read the file if there is one.

    Of several processes that do this at once, all return the same key. Missing folders are made, for the owner
    only.

    Raises UserError if the file cannot be written, or as `read_key` does if there is one.
    """
    try:
        path = Path(path)
        if not os.path.lexists(path):
            _make_folders(path.parent)
            _write_new(path, secrets.token_urlsafe(32) + "\n")
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error  # without the number and path that an OSError adds
        raise UserError(f"cannot write key file {path}: {reason}") from error
    return read_key(path)


def _make_folders(folder: Path) -> None:
    """Make a folder and its missing parents with mode 0700, whatever the umask."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        folder.chmod(0o700)  # a umask such as 0277 took bits that the owner needs


def _write_new(path: Path, content: str) -> None:
    """Create `path` with all of its content at once; if another process was first, leave the other's file."""
    # mkstemp opens with O_CREAT | O_EXCL | O_NOFOLLOW and mode 0600.
    descriptor, temporary = tempfile.mkstemp(prefix=".key-", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            os.fchmod(descriptor, 0o600)  # a umask such as 0277 took bits that the owner needs
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        try:
            # Unlike a rename, a link never replaces a file, nor does it follow a symbolic link at `path`.
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        os.unlink(temporary)


def is_loopback(host: str) -> bool:
    """Whether other machines cannot reach a server that listens on this host; False where that is not known."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # Python versions disagree on ::ffff:127.0.0.1, so IPv6 has one spelling of one address here.
    return address.is_loopback if address.version == 4 else address == ipaddress.IPv6Address("::1")
