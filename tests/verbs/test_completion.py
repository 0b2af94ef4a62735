"""What TAB offers, asked for as a shell asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_cli.cli import app
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.raw import RecipeError
from grpo_cli.verbs.completion import complete_setting
from grpo_cli.verbs.init import STARTS
from tests.recipe.recipes import plain

ROOT = Path(__file__).parents[2]


def offers(line: str) -> list[str]:
    """What bash is told when TAB is pressed at the end of `line`."""
    words = line.split(" ")
    environment = {
        "_GRPO_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    result = CliRunner().invoke(app, env=environment, prog_name="grpo", catch_exceptions=False)
    return result.output.split()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "first.yaml",
        "second.yml",
        "notes.txt",
        ".hidden.yaml",
        "runs/tldr/recipe.yaml",
        "runs/x/a.yaml",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path


def test_verbs_and_options_are_offered() -> None:
    assert {"train", "check", "recipe", "init"} <= set(offers("grpo "))
    assert offers("grpo tr") == ["train"]
    assert offers("grpo recipe d") == ["diff"]
    assert offers("grpo train --res") == ["--resume"]


@pytest.mark.parametrize(
    "verb", ["train", "check", "sample", "eval", "slurm", "recipe diff", "recipe diff x.yaml"]
)
def test_recipes_and_folders_are_offered_and_no_other_files(verb: str, folder: Path) -> None:
    assert offers(f"grpo {verb} ") == ["first.yaml", "runs/", "second.yml"]
    assert offers(f"grpo {verb} fi") == ["first.yaml"]
    assert offers(f"grpo {verb} no") == []


def test_a_folder_that_is_the_only_one_is_looked_into(folder: Path) -> None:
    assert offers("grpo check r") == ["runs/tldr/", "runs/x/"], "else the shell would put a space after runs/"
    assert offers("grpo check runs/t") == ["runs/tldr/recipe.yaml"]
    assert offers(f"grpo check {folder}/f") == [f"{folder}/first.yaml"]
    assert offers("grpo check .h") == [".hidden.yaml"]


def test_a_folder_that_is_not_there_and_one_that_is_empty_are_no_errors(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert offers("grpo check nowhere/x") == []
    assert offers("grpo check e") == ["empty/"]


def test_the_keys_of_set_are_those_of_the_schema() -> None:
    assert offers("grpo train x.yaml --set loss.eps") == ["loss.epsilon=", "loss.epsilon_high="]
    assert offers("grpo train x.yaml --set rewards.2.w") == ["rewards.2.weight=", "rewards.2.workers="]
    assert "train.max_steps=" in offers("grpo train --set ")
    assert offers("grpo train --set nothing") == []


def test_a_key_that_is_the_only_one_is_offered_with_its_values() -> None:
    assert offers("grpo train --set loss.agg")[:3] == [
        "loss.aggregation=", "loss.aggregation=sum_then_normalize", "loss.aggregation=normalize_then_sum",
    ]  # fmt: skip
    assert offers("grpo check --set model.gradient")[1:] == [
        f"model.gradient_checkpointing={value}" for value in ("true", "false")
    ]
    assert offers("grpo train --set train.prompts") == ["train.prompts_per_step=", "train.prompts_per_step=8"]
    assert offers("grpo train --set optim.betas") == ["optim.betas="], "a list would need quotes"
    assert offers("grpo train --set model.nam") == ["model.name="], "it has to be given one"


def test_a_value_that_has_begun_is_completed() -> None:
    assert offers("grpo train --set loss.type=d") == ["loss.type=dr_grpo", "loss.type=dapo"]
    assert offers("grpo train --set loss.epsilon=") == ["loss.epsilon=", "loss.epsilon=0.2"]
    assert offers("grpo train --set loss.eps=") == []


def test_every_value_that_is_offered_is_one_that_the_recipe_takes() -> None:
    refused = []
    for key in complete_setting(""):
        for offer in complete_setting(key)[1:]:
            try:
                load_recipe(plain(), [offer])
            except RecipeError as error:
                refused.append(str(error))
    # Some contradict the rest of this recipe, or lack the rest of their section.
    assert [text for text in refused if " must be one of " in text or "not the string" in text] == []
    assert [text for text in refused if "it should" in text or " must be a" in text] == []


def test_starting_points_are_offered() -> None:
    assert offers("grpo init new --from ") == list(STARTS)
    assert offers("grpo init new --from g") == ["gsm8k", "game"]


def test_bash_offers_what_grpo_tells_it_and_waits_for_no_torch(folder: Path) -> None:
    program = folder / "bin" / "grpo"
    program.parent.mkdir()
    code = (
        "import atexit, sys; from grpo_cli import cli; sys.argv[0] = 'grpo'\n"
        "atexit.register(lambda: {'torch', 'transformers', 'datasets'} & set(sys.modules) and print('slow'))\n"
        "cli.main()"
    )
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    program.chmod(0o755)
    # After the first bash has put what is alike of both; its words end at an equals sign.
    lines = (
        "loss.eps",
        "loss.epsilon =",
        "loss.type = d",
        "loss.type = nothing",
        "model.gradient_checkpointing = t",
    )
    script = "source <(grpo --show-completion bash)\ncomplete -p grpo\n" + "".join(
        f"COMP_WORDS=(grpo train first.yaml --set {line}) COMP_CWORD={3 + len(line.split())}\n"
        """_grpo_completion grpo; echo "${COMPREPLY[*]}"\n"""
        for line in lines
    )
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "complete -o default -F _grpo_completion grpo",
        "loss.epsilon= loss.epsilon_high=",
        "0.2",
        "dr_grpo dapo",
        "",
        "true",
    ]
