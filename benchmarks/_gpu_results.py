"""What the pieces of `benchmarks.gpu` have shown, kept in a folder, and the report that they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks._report import Bar, Report

ROOT = Path(__file__).parent.parent
SOURCES = ("grpo_cli", "rewards", "benchmarks")

Status = Literal["done", "failed", "out of time"]


@dataclass(frozen=True)
class Finding:
    """What a piece shows."""

    rows: Sequence[Sequence[str]] = ()
    """Of its part's table."""
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Finding:
        return cls(values["rows"], [Bar(**bar) for bar in values["bars"]], values["notes"])


@dataclass(frozen=True)
class Part:
    """A chapter of the report: pieces that each run in a process of their own, one row or several each."""

    name: str
    title: str
    about: str
    """What is measured and how it is counted: a paragraph under the title, however its lines are broken."""
    columns: Sequence[str]
    limit_s: int
    """Longest time for one piece."""
    pieces: Sequence[str]
    rehearsed: Sequence[str]
    """The pieces that a rehearsal goes through."""
    run: Callable[[str, str, bool], Finding]
    """What the piece of this name shows on `cuda` or `cpu`, or, if the last argument says so, on tiny models."""

    def names(self, rehearse: bool) -> Sequence[str]:
        return self.rehearsed if rehearse else self.pieces


@dataclass(frozen=True)
class Place:
    """What a result holds for."""

    card: str
    """Name of the GPU and version of its driver."""
    sources: str
    """See `sources_digest`."""
    rehearsal: bool


@dataclass(frozen=True)
class Outcome:
    """How a piece ended."""

    place: Place
    status: Status
    seconds: float
    finding: Finding = field(default_factory=Finding)
    tail: Sequence[str] = ()
    """Last lines that it printed, if it did not end well."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Outcome:
        finding = Finding.of(values["finding"])
        return cls(Place(**values["place"]), values["status"], values["seconds"], finding, values["tail"])

    def settles(self, place: Place) -> bool:
        """Whether the piece need not be run again there. What failed is tried again."""
        return self.status == "done" and self.place == place


class Results:
    """A file for each part, `PART.json`: its pieces' outcomes by their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, part: str) -> dict[str, Outcome]:
        path = self.folder / f"{part}.json"
        if not path.exists():
            return {}
        return {name: Outcome.of(values) for name, values in json.loads(path.read_text("utf-8")).items()}

    def add(self, part: str, piece: str, outcome: Outcome) -> None:
        """Replace the piece's outcome; the file is whole at any moment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        outcomes = self.of(part) | {piece: outcome}
        path, beside = self.folder / f"{part}.json", self.folder / f"{part}.json.new"
        text = json.dumps({name: asdict(each) for name, each in outcomes.items()}, indent=1, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)


def sources_digest(root: Path = ROOT) -> str:
    """Of all Python files that a result depends on: it says more than a commit where files were changed, and does
    without git."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def write_report(parts: Sequence[Part], results: Results, place: Place, path: Path, commit: str) -> None:
    """All outcomes of this card, on the screen and as Markdown."""
    report = Report()
    report.lines("# What one GPU shows")
    if place.rehearsal:
        report.lines("**A rehearsal with tiny models: everything runs, and no figure means anything.**")
    report.lines(f"{place.card}; commit {commit}, sources {place.sources}.")
    for part in parts:
        outcomes = {
            name: outcome
            for name, outcome in results.of(part.name).items()
            if name in part.names(place.rehearsal)
            and (outcome.place.card, outcome.place.rehearsal) == (place.card, place.rehearsal)
        }
        _write_part(report, part, outcomes, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    report.write(path)


def _write_part(report: Report, part: Part, outcomes: Mapping[str, Outcome], place: Place) -> None:
    report.lines(f"## {part.title}")
    report.lines(" ".join(part.about.split()))
    rows: list[Sequence[str]] = []
    lines: list[str] = []
    failures: list[str] = []
    for name in part.names(place.rehearsal):
        outcome = outcomes.get(name)
        if outcome is None:
            rows.append([name, "not run", *[""] * (len(part.columns) - 2)])
            continue
        if outcome.place.sources != place.sources:
            lines.append(f"{name} was measured on sources {outcome.place.sources}.")
        if outcome.status != "done":
            last = outcome.tail[-1].replace("|", "/") if outcome.tail else "it printed nothing"
            rows.append([name, f"{outcome.status}: {last}", *[""] * (len(part.columns) - 2)])
            shown = "\n".join(outcome.tail)
            failures.append(f"{name} ended so after {outcome.seconds:.0f} s:\n\n```\n{shown}\n```")
        rows.extend(outcome.finding.rows)
        lines.extend(map(str, outcome.finding.bars))
        lines.extend(outcome.finding.notes)
    report.table(part.name, part.columns, rows)
    if lines:
        report.lines(*lines)
    for failure in failures:
        report.lines(failure)
