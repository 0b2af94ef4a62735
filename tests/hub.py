"""A server on loopback that answers as the Hugging Face Hub does, for what is gated, not there or whole."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 39 + "1"

REPOSITORY = re.compile(
    r"/(?:api/)?(?:(?:models|datasets)/)?(?P<name>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<what>resolve|revision|tree|paths-info|xet-read-token)(?:/(?P<revision>[^/?]+))?(?:/(?P<file>[^?]+))?)?"
)


class Hub(BaseHTTPRequestHandler):
    """`owner/gated` wants its terms accepted, other repositories are the folders in that of the server. The token
    `hf_known` is somebody's."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer()

    def _answer(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        found = REPOSITORY.match(self.path)
        if self.path == "/":
            return self._send(200)
        if token and token != "hf_known":
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if found is None:
            return self._refuse(404, "", "Not found")
        name = found["name"]
        if name == "owner/gated":
            who = "Your request is awaiting a review" if token else "Access to this repository is restricted"
            return self._refuse(403 if token else 401, "GatedRepo", who)
        folder = self.folder / name.split("/")[1]
        if not folder.is_dir():
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if found["revision"] not in (None, "main", COMMIT):
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        self._repository(folder, name, found["what"], found["file"])

    def _repository(self, folder: Path, name: str, what: str | None, file: str | None) -> None:
        if what in (None, "revision"):
            siblings = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            return self._send(200, json.dumps(about).encode())
        if what == "tree":
            tree = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": COMMIT}
                for path in sorted(folder.iterdir())
            ]
            return self._send(200, b"[]" if file else json.dumps(tree).encode())
        if what == "resolve" and file and (folder / file).is_file():
            return self._send(200, (folder / file).read_bytes())
        self._refuse(404, "EntryNotFound", "Entry not found")

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), **headers)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a Hub that has each folder in `folder` as a model and data set of `owner`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubOfFolder", (Hub,), {"folder": folder}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
