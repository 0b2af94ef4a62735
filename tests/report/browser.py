"""A headless Chromium for the tests of the page; they are skipped where there is none."""

from __future__ import annotations

import functools
import html
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
DRAWN = "html[data-drawn=true]"


def chromium() -> str | None:
    """The browser's path, if it is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def launched() -> Iterator[Any]:
    """A browser; the test is skipped without one."""
    api = pytest.importorskip("playwright.sync_api")
    path = chromium()
    if path is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page that remembers what went wrong in it."""

    def __init__(self, browser: Any, *, scheme: str = "light", width: int = 1400) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, address: str) -> Any:
        self.page.goto(address)
        self.page.wait_for_selector(DRAWN, state="attached", timeout=60_000)
        return self.page

    def counted_plots(self) -> tuple[int, int]:
        """Plots on the page, and those of them with a curve that is drawn."""
        frames = self.page.locator(".plot")
        drawn = self.page.locator(".plot:has(path.js-line, path.js-fill, path.point)")
        return frames.count(), drawn.count()


@contextmanager
def served(folder: Path, policy: str) -> Iterator[str]:
    """A folder over loopback, each answer with a policy."""

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("Content-Security-Policy", policy)
            super().end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the test's output is its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def policy_of(page: Path) -> str:
    """The policy that a page carries."""
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page.read_text(encoding="utf-8"))
    assert found is not None
    return html.unescape(found[1])
