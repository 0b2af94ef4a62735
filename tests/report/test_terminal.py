"""What models and users write does not act on the terminal."""

from __future__ import annotations

from rich.text import Text

from grpo_cli.report.terminal import beginning, ending, printable, visible


def test_control_characters_become_visible_and_markup_stays_text() -> None:
    text = "\x1b[31m[red]a\u202e\tb\n"
    assert visible(text) == "\ufffd[31m[red]a\ufffd b\n"
    assert Text.from_markup(printable(text)).plain == visible(text)


def test_spaces_of_all_kinds_are_spaces() -> None:
    assert visible("日\u3000本\tif\xa0x:\r\n\u2028") == "日 本 if x: \n "


def test_long_texts_are_cut_where_they_matter_least() -> None:
    assert beginning("a" + "b" * 400) == "a" + "b" * 299 + "…"
    assert ending([{"role": "user", "content": "b" * 400 + "a"}]) == "…" + "b" * 299 + "a"
