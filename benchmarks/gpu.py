"""Everything that one GPU can show, in one report: `make gpu`.

Parts are made of pieces, each of which runs in a process of its own under a time limit: one that is out of memory
or crashes is a line in the report, and the others go on. Results are kept in a folder. A piece that is done for
these sources and this card is not run again, so a run that was stopped, or told to end within some time, goes on
where it was. Models have random weights; nothing is downloaded.

    python -m benchmarks.gpu [--parts learn,step] [--within 540] [--out FOLDER] [--markdown FILE]
    python -m benchmarks.gpu --device cpu --rehearse
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import (
    _gpu_decode,
    _gpu_learn,
    _gpu_machine,
    _gpu_memory,
    _gpu_profile,
    _gpu_published,
    _gpu_step,
    _gpu_tests,
)
from benchmarks._gpu_results import ROOT, Finding, Outcome, Part, Place, Results, sources_digest, write_report

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        _gpu_machine.PART,
        _gpu_tests.PART,
        _gpu_learn.PART,
        _gpu_published.PART,
        _gpu_memory.PART,
        _gpu_profile.PART,
        _gpu_decode.PART,
        _gpu_step.PART,
    )
}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
TAIL_LINES = 15
LEAST_SHARE = 1 / 3
"""Of its limit that has to be left for a piece to be started."""


def run_piece(command: Sequence[str], answer: Path, limit_s: float, place: Place) -> Outcome:
    """Run a piece and read what it has written to `answer`; its processes are gone afterwards.

    Args:
        command: of the process.
        answer: file that it writes its finding to.
        limit_s: longest time that it may take.
        place: where it runs.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closed when this process ends, however it does: see end_with_parent
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            cwd=ROOT,
            process_group=0,
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
        seconds = time.monotonic() - start
        if code == 0 and answer.exists():
            return Outcome(place, "done", seconds, Finding.of(json.loads(answer.read_text("utf-8"))))
        log.seek(0)
        lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
    tail = [line for line in lines if line.strip()][-TAIL_LINES:]
    if code is None:
        return Outcome(place, "out of time", seconds, tail=[*tail, f"stopped after {limit_s:.0f} s"])
    if code < 0:
        tail.append(f"ended by {signal.Signals(-code).name}")
    return Outcome(place, "failed", seconds, tail=tail)


def end_with_parent() -> None:
    """Let this process and its group end when the one that started it is gone: none shall hold the GPU alone."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would be missed when the interpreter ends
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever of the piece's processes is still there, and let go of the GPU with them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def run_parts(options: argparse.Namespace, results: Results, place: Place) -> list[str]:
    """Run what is not done; return the pieces that failed or had no time."""
    end = time.monotonic() + options.within if options.within else None
    missing = []
    for part in options.parts:
        for name in part.names(options.rehearse):
            known = results.of(part.name).get(name)
            label = f"{part.name} {name}"
            if known is not None and known.settles(place) and not options.again:
                print(f"{label}: done before", flush=True)
                continue
            limit: float = part.limit_s
            if end is not None:
                limit = min(limit, end - time.monotonic())
            if limit < LEAST_SHARE * part.limit_s:
                print(f"{label}: no time is left for it", flush=True)
                missing.append(label)
                continue
            with tempfile.TemporaryDirectory() as folder:
                answer = Path(folder, "finding.json")
                command = [sys.executable, "-m", "benchmarks.gpu", "--piece", part.name, name]
                command += ["--device", options.device, "--answer", str(answer)]
                command += ["--rehearse"] * options.rehearse
                outcome = run_piece(command, answer, limit, place)
            results.add(part.name, name, outcome)
            print(f"{label}: {outcome.status} in {outcome.seconds:.0f} s", *outcome.tail[-1:], flush=True)
            if outcome.status != "done":
                missing.append(label)
    return missing


def card_and_driver(device: str) -> str:
    """As nvidia-smi names the first card; the processes that measure see the same one first."""
    if device == "cpu":
        return "no GPU"
    program = shutil.which("nvidia-smi")
    if program is None:
        sys.exit("there is no nvidia-smi, so there is no NVIDIA GPU here; --device cpu --rehearse does without")
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode or not done.stdout.strip():
        sys.exit(f"nvidia-smi finds no GPU: {(done.stdout + done.stderr).strip()}")
    name, driver = done.stdout.splitlines()[0].split(", ")
    return f"{name}, driver {driver}"


def commit_of(root: Path) -> str:
    """Short name of the commit, and whether files differ from it."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    done = subprocess.run(
        [git, "describe", "--always", "--dirty=, changed", "--abbrev=9"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="everything that one GPU can show")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; all if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--markdown", type=Path, default=Path("runs/gpu-report.md"), help="the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument(
        "--within", type=float, metavar="SECONDS", help="end by then; start nothing that could not"
    )
    parser.add_argument("--again", action="store_true", help="run what is done, too")
    parser.add_argument("--piece", nargs=2, metavar=("PART", "PIECE"), help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = [name for name in options.parts.split(",") if name]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    if options.device == "cpu" and not options.rehearse:
        parser.error("--device cpu is for --rehearse: its models are too large for a CPU")
    options.parts = [part for name, part in PARTS.items() if name in names]
    return options


def main() -> None:
    options = parse_options()
    if options.piece is not None:
        end_with_parent()
        part, piece = options.piece
        finding = PARTS[part].run(piece, options.device, options.rehearse)
        options.answer.write_text(json.dumps(asdict(finding)), encoding="utf-8")
        return
    results = Results(options.out)
    place = Place(card_and_driver(options.device), sources_digest(), options.rehearse)
    missing = run_parts(options, results, place)
    write_report(list(PARTS.values()), results, place, options.markdown, commit_of(ROOT))
    print(f"report: {options.markdown}; results: {options.out}")
    if missing:
        sys.exit(f"not done: {', '.join(missing)}")


if __name__ == "__main__":
    main()
