"""How long the report of a long run takes to make and to open, and how large it is.

    python -m benchmarks.report_page [--steps 10000] [--prompts 8] [--group-size 8] [--tokens 600] [--repeats 5]

The run is made up: metrics of every step, completions with the texts of their tokens. A headless Chromium opens
the page from the disk; without one only the making is measured.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks._report import Bar
from grpo_cli.report.page import write_report
from grpo_cli.report.run import read_run
from tests.report.run_folders import MadeUp, write_run

LONGEST_OPENING_S = 3.0
LARGEST_BYTES = 30e6
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def opened(page: Path, browser_path: str) -> tuple[float, float]:
    """Seconds until the page can be read and scrolled, and until every plot is drawn."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        start = time.perf_counter()
        tab.goto(page.as_uri(), wait_until="load")
        loaded = time.perf_counter() - start
        tab.wait_for_selector("html[data-drawn=true]", state="attached")
        drawn = time.perf_counter() - start
        browser.close()
    return loaded, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"steps": 10_000, "prompts": 8, "group_size": 8, "tokens": 600, "repeats": 5}
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = vars(parser.parse_args())
    repeats = options.pop("repeats")
    with tempfile.TemporaryDirectory() as folder:
        run_folder = write_run(Path(folder) / "run", MadeUp(**options, distinct_files=50))
        page = Path(folder) / "report.html"
        start = time.perf_counter()
        write_report([read_run(run_folder)], page)
        print(f"made in {time.perf_counter() - start:.2f} s")
        print(Bar("bytes of the page", page.stat().st_size, LARGEST_BYTES, at_most=True))
        browser_path = next((path for path in map(shutil.which, BROWSERS) if path), None)
        if browser_path is None:
            return print("no Chromium is installed: opening is not measured")
        times = [opened(page, browser_path) for _ in range(repeats)]
    print("opened, every plot drawn, s:", *(f"{loaded:.2f}, {drawn:.2f};" for loaded, drawn in times))
    loaded, drawn = (statistics.median(values) for values in zip(*times, strict=True))
    print(Bar("seconds until the page is open", loaded, LONGEST_OPENING_S, at_most=True))
    print(f"      seconds until every plot is drawn: {drawn:.2f}")


if __name__ == "__main__":
    main()
