"""What a run does not use is told."""

from __future__ import annotations

from pathlib import Path

from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.unused import unused_settings

RECIPE = {
    "model": {"name": "org/model", "revision": "v1", "chat_template": "{{ messages }}"},
    "data": {"name": "org/data", "config": "main"},
    "rewards": ["a:b"],
    "train": {"output_dir": "runs/x", "max_steps": 1},
}


def test_nothing_is_told_where_everything_is_used() -> None:
    assert list(unused_settings(load_recipe(RECIPE), conversational=True)) == []


def test_what_a_local_model_and_file_leave_unused_is_told(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    recipe = load_recipe(RECIPE, [f"data.name={file}", f"model.name={tmp_path}"])
    told = list(unused_settings(recipe, conversational=False))
    assert [line.split(" ")[0] for line in told] == ["data.config", "model.revision", "model.chat_template"]


def test_a_project_is_told_where_no_tracker_has_projects() -> None:
    told = "logging.project (math) is not used: none of logging.trackers has projects"
    for trackers, expected in (("[tensorboard]", [told]), ("[]", [told]), ("[tensorboard, wandb]", [])):
        recipe = load_recipe(RECIPE, ["logging.project=math", f"logging.trackers={trackers}"])
        assert list(unused_settings(recipe, conversational=True)) == expected
