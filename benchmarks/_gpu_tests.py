"""The tests part of `benchmarks.gpu`: the tests that need a CUDA device."""

from __future__ import annotations

import re
import subprocess
import sys

from benchmarks._gpu_results import ROOT, Finding, Part
from benchmarks._report import Bar

COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")


def files_with_gpu_tests() -> list[str]:
    """Only these are collected: others may need packages that a machine with a GPU need not have."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if "mark.gpu" in path.read_text("utf-8")]


def counts(output: str) -> dict[str, int]:
    """How many tests passed, failed and so on, by pytest's last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    return {name.rstrip("s"): int(count) for count, name in COUNT.findall(lines[-1] if lines else "")}


def run(piece: str, device: str, rehearse: bool) -> Finding:
    """vLLM's tests are left out: they have a machine with several GPUs of their own."""
    files = [path for path in files_with_gpu_tests() if "vllm" not in path]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    found = counts(done.stdout)
    if done.returncode not in (0, 1) or not found:
        raise SystemExit(f"pytest ended with {done.returncode}")
    row = [piece, *(str(found.get(name, 0)) for name in ("passed", "failed", "error", "skipped"))]
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    wrong = found.get("failed", 0) + found.get("error", 0)
    return Finding([row], [Bar("tests that do not pass", wrong, 0, at_most=True)], failures)


ABOUT = """
`pytest -m gpu` without those that need vLLM.
"""

PART = Part(
    name="tests",
    title="Tests that need a GPU",
    about=ABOUT,
    columns=("tests", "passed", "failed", "errors", "skipped"),
    limit_s=420,
    pieces=("gpu",),
    rehearsed=("gpu",),
    run=run,
)
