"""`grpo report RUN...`: one page about runs, or words in the terminal. No torch."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from grpo_cli.errors import UserError
from grpo_cli.report.page import write_report
from grpo_cli.report.run import Run, read_run
from grpo_cli.report.text import print_report

PAGE = "report.html"


def report(folders: Sequence[Path], out: Path | None, *, opens: bool) -> Path:
    """Write a page about runs, and open it in a browser if asked to.

    Args:
        folders: of the runs.
        out: the file; if not given, in the run's folder, of several runs in this one.

    Returns:
        The file.

    Raises:
        UserError: a folder is no run's or is given twice, or the page cannot be written.
        RunError: a run's metrics are damaged.
    """
    runs = read_runs(folders)
    if out is None:
        out = folders[0] / PAGE if len(folders) == 1 else Path(PAGE)
    write_report(runs, out)
    if opens:
        webbrowser.open(out.resolve().as_uri())
    return out


def print_in_words(folders: Sequence[Path], console: Console) -> None:
    """Print what `report` has to say first, without curves and completions."""
    print_report(read_runs(folders), console)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of folders that are all different.

    Raises:
        UserError: a folder is no run's or is given twice.
        RunError: a run's metrics are damaged.
    """
    places = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if places[number] in places[:number]:
            raise UserError(f"{folder} is given twice: name each run once")
    return [read_run(folder) for folder in folders]
