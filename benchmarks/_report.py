"""Tables and verdicts, on the screen and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Bar:
    """What a benchmark has to show."""

    name: str
    value: float
    bound: float
    at_most: bool = False

    def __str__(self) -> str:
        met = self.value <= self.bound if self.at_most else self.value >= self.bound
        verdict, sign = "PASS" if met else "MISS", "≤" if self.at_most else "≥"
        return f"{verdict}  {self.name}: {self.value:.2f} ({sign} {self.bound})"


@dataclass
class Report:
    """Collects what is printed; `write` puts it all into a Markdown file."""

    console: Console = field(default_factory=lambda: Console(width=max(120, Console().width)))
    _parts: list[str] = field(default_factory=list)

    def lines(self, *lines: str) -> None:
        for line in lines:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._parts.append("  \n".join(lines))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first two columns are text, the others numbers."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < 2 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        marks = ["---" if index < 2 else "---:" for index in range(len(columns))]
        lines = ["| " + " | ".join(row) + " |" for row in (columns, marks, *rows)]
        self._parts.append("\n".join([f"**{title}**", "", *lines]))

    def write(self, path: Path | None) -> None:
        if path is not None:
            path.write_text("\n\n".join(self._parts) + "\n", encoding="utf-8")
