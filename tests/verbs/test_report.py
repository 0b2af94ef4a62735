"""`grpo report` from the command line."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_cli.cli import app
from grpo_cli.errors import UserError
from tests.report.run_folders import MadeUp, write_run


def report(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output.strip()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", MadeUp(steps=3))


def test_a_page_goes_into_the_folder_of_its_run(run: Path) -> None:
    assert report(str(run)) == str(run / "report.html")
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_page_of_several_runs_goes_here_or_where_it_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_run(tmp_path / "other", MadeUp(steps=3))
    monkeypatch.chdir(tmp_path)
    assert report(str(run), str(other)) == "report.html"
    assert (tmp_path / "report.html").is_file()
    assert report(str(run), str(other), "--out", "both.html") == "both.html"
    assert (tmp_path / "both.html").is_file()


def test_it_opens_in_a_browser_when_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    report(str(run))
    assert opened == []
    report(str(run), "--open")
    assert opened == [(run / "report.html").as_uri()]


def test_a_folder_that_is_no_run_or_comes_twice_is_refused(run: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([str(tmp_path)], "is not the folder of a run: it has no recipe.yaml"),
        ([str(run), str(run / ".." / "run")], "is given twice"),
        ([str(run), "--text", "--open"], "--text prints"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)
