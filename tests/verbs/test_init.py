from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_cli.errors import UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.verbs.init import init

ROOT = Path(__file__).parents[2]
NAMES = ["recipe.yaml", "my_rewards.py", "prompts.jsonl"]


def grpo(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo_cli.cli", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_init_writes_passes_check_as_it_is(tmp_path: Path) -> None:
    written = grpo("init", "new/experiment", folder=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.splitlines() == [
        *(f"wrote new/experiment/{name}" for name in NAMES),
        "next: cd new/experiment && grpo check recipe.yaml",
    ]
    checked = grpo("check", "recipe.yaml", folder=tmp_path / "new" / "experiment")
    assert checked.returncode == 0, checked.stderr
    assert "5 prompts (texts); columns for rewards: keyword" in checked.stdout
    assert "mentions_keyword, weight 1: 0 for" in checked.stdout
    assert "reward_len, weight 0.01: " in checked.stdout
    assert "the recipe is fine" in checked.stdout


def test_init_returns_what_it_wrote_and_the_recipe_loads(tmp_path: Path) -> None:
    assert init(tmp_path / "x") == [tmp_path / "x" / name for name in NAMES]
    assert load_recipe(tmp_path / "x" / "recipe.yaml").train.max_steps == 100


def test_the_reward_that_init_writes_scores_as_it_says(tmp_path: Path) -> None:
    init(tmp_path)
    names: dict[str, object] = {}
    exec((tmp_path / "my_rewards.py").read_text(), names)
    score = names["mentions_keyword"]
    assert callable(score)
    assert score(["on jupiter", "no", "x"], ["Jupiter", "Paris", None], prompts=[]) == [1.0, 0.0, None]


def test_init_into_a_folder_with_other_files_leaves_them_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    init(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", NAMES)
def test_init_never_writes_over_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} exists already; choose another folder"):
        init(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_init_into_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file: File exists"):
        init(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write to .*inside: Not a directory"):
        init(tmp_path / "file" / "inside")
