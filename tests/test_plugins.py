from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from grpo_cli.errors import UserError
from grpo_cli.plugins import load_object, origin


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    return tmp_path


def message(path: str, setting: str = "rewards.0") -> str:
    with pytest.raises(UserError) as caught:
        load_object(path, setting=setting)
    return str(caught.value)


def test_a_function_of_a_file_in_the_current_folder_is_found(here: Path) -> None:
    (here / "plug_a.py").write_text("def f(): return 7\n")
    assert load_object("plug_a:f", setting="x")() == 7


def test_a_function_in_a_package_of_the_current_folder_is_found(here: Path) -> None:
    (here / "plug_pkg").mkdir()
    (here / "plug_pkg" / "inner.py").write_text("LIMIT = 3\n")
    assert load_object("plug_pkg.inner:LIMIT", setting="x") == 3


def test_attributes_of_attributes_are_found(here: Path) -> None:
    (here / "plug_b.py").write_text("class Judge:\n    @staticmethod\n    def score(): return 1\n")
    assert load_object("plug_b:Judge.score", setting="x")() == 1


def test_an_installed_module_is_found() -> None:
    assert load_object("json:loads", setting="x")("[1]") == [1]


def test_the_current_folder_comes_before_installed_packages(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = here / "site"
    installed.mkdir()
    (installed / "plug_c.py").write_text("WHERE = 'installed'\n")
    (here / "plug_c.py").write_text("WHERE = 'here'\n")
    monkeypatch.syspath_prepend(installed)
    assert load_object("plug_c:WHERE", setting="x") == "here"


def test_the_current_folder_is_searched_once_however_often_it_is_asked(here: Path) -> None:
    (here / "plug_d.py").write_text("A = 1\n")
    before = len(sys.path)
    for _ in range(3):
        load_object("plug_d:A", setting="x")
    assert len(sys.path) <= before + 1


def test_a_file_written_after_a_failed_import_is_found(here: Path) -> None:
    assert "there is no module 'plug_e'" in message("plug_e:A")
    (here / "plug_e.py").write_text("A = 1\n")
    assert load_object("plug_e:A", setting="x") == 1


@pytest.mark.parametrize("path", ["", "f", "plug.f", ":f", "plug:", ":"])
def test_a_path_without_both_parts_shows_the_form(path: str) -> None:
    assert (
        message(path) == f"rewards.0: {path!r} is not of the form module:name, such as rewards.length:reward_len"
    )


@pytest.mark.parametrize("path", ["no_such_module:f", "no.such.module:f", "json.no_such_part:f"])
def test_a_module_that_is_not_there_names_where_it_was_looked_for(here: Path, path: str) -> None:
    module = path.partition(":")[0]
    assert message(path, "optim.name") == (
        f"optim.name: there is no module {module!r} in {here} or among the installed packages"
    )


def test_a_module_that_needs_another_names_the_other(here: Path) -> None:
    (here / "plug_f.py").write_text("import plug_needed.inner\n")
    assert message("plug_f:f") == "rewards.0: plug_f needs plug_needed, which is not installed"


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("x = 1\ndef f(:\n", "2: SyntaxError: invalid syntax"),
        ("import json\njson.loads('{')\n", "JSONDecodeError: "),
        ("\n\n1 / 0\n", "3: ZeroDivisionError: division by zero"),
        ("from json import nothing\n", "ImportError: cannot import name 'nothing'"),
        ("import sys\nsys.exit(3)\n", "2: SystemExit: 3"),
        ("raise AssertionError\n", "1: AssertionError"),
    ],
)
def test_a_module_that_fails_on_import_names_the_line(here: Path, source: str, place: str) -> None:
    (here / "plug_g.py").write_text(source)
    shown = message("plug_g:f")
    assert shown.startswith("rewards.0: importing plug_g failed: ")
    assert place in shown
    assert "\n" not in shown


def test_an_interrupt_while_importing_is_passed_on(here: Path) -> None:
    (here / "plug_h.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_object("plug_h:f", setting="x")


def test_a_name_that_is_not_there_suggests_the_nearest(here: Path) -> None:
    (here / "plug_i.py").write_text("def reward_len(): ...\n")
    assert message("plug_i:rewardlen") == "rewards.0: plug_i has no rewardlen; did you mean reward_len?"
    assert message("plug_i:zzz") == "rewards.0: plug_i has no zzz"
    assert message("plug_i:reward_len.zzz") == "rewards.0: plug_i has no reward_len.zzz"


def test_the_origin_of_an_error_is_where_it_was_raised_or_the_line_of_the_code_that_was_called(here: Path) -> None:
    (here / "plug_j.py").write_text("import json\ndef parse():\n    json.loads('{')\n")
    parse = load_object("plug_j:parse", setting="x")
    with pytest.raises(ValueError, match="Expecting") as caught:
        parse()
    assert origin(caught.value).startswith(f"{json.decoder.__file__}:")
    assert origin(caught.value, below=__file__).startswith(f"{here}/plug_j.py:3: JSONDecodeError: Expecting")


def test_the_origin_of_a_call_that_failed_itself_has_no_place() -> None:
    with pytest.raises(TypeError) as caught:
        load_object("json:loads", setting="x")()
    assert origin(caught.value, below=__file__).startswith("TypeError: loads() missing 1 required")
