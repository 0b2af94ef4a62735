"""`grpo_cli.train` from Python: objects in place of names, and the documented example as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import grpo_cli
from grpo_cli.errors import UserError
from grpo_cli.recipe.load import load_recipe
from tests.conftest import byte_tokenizer, tiny_llama

ROOT = Path(__file__).parents[1]


def score_length(completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def second_score(completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.slow
def test_the_documented_example_runs(tiny_model_dir: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    code = example.group(1).replace('"MODEL"', repr(str(tiny_model_dir)))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("runs/yes ")
    assert (tmp_path / "runs" / "yes" / "final" / "config.json").exists()


def test_train_is_a_function_and_a_package() -> None:
    import grpo_cli.train.loop

    assert callable(grpo_cli.train)
    assert grpo_cli.train.loop.train_loop is not None


def test_objects_stand_in_for_the_recipes_sections(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.lm_head.weight.detach().clone()
    seen: list[int] = []

    class Watcher(grpo_cli.Callback):
        def on_step_end(self, state: Any) -> None:
            seen.append(state.step)
            state.metrics["mine"] = 7.0
            state.stop = state.step == 2

    result = grpo_cli.train(
        {
            "generation": {"num_generations": 2, "max_completion_tokens": 4},
            "optim": {"scheduler": "constant", "learning_rate": 0.1},
            "train": {"output_dir": str(tmp_path / "run"), "max_steps": 5, "prompts_per_step": 2},
        },
        model=model,
        tokenizer=byte_tokenizer(),
        rewards=score_length,
        train_data=[{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}],
        eval_data=[{"prompt": "d"}],
        callbacks=[Watcher()],
        optimizer=optimizer,
    )
    assert seen == [1, 2]
    assert [row["mine"] for row in result.metrics] == [7.0, 7.0]
    assert result.model is model
    assert not torch.equal(model.lm_head.weight, before)
    written = load_recipe(result.output_dir / "recipe.yaml")
    assert written.rewards[0].path == f"{__name__}:score_length"


def test_weights_of_the_recipe_apply_to_reward_objects(tmp_path: Path) -> None:
    result = grpo_cli.train(
        {
            "rewards": [{"path": "a:b", "weight": 2.0, "name": "double"}],
            "generation": {"num_generations": 2, "max_completion_tokens": 4},
            "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "prompts_per_step": 2},
        },
        model=tiny_llama(),
        tokenizer=byte_tokenizer(),
        rewards=[score_length],
        train_data=[{"prompt": "a"}],
    )
    row = result.metrics[0]
    assert row["reward"] == pytest.approx(2 * row["rewards/double/mean"])


def test_objects_go_with_a_recipe_file_as_well(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    result = grpo_cli.train(
        path, rewards=[score_length, second_score], eval_data=[{"prompt": "d"}], overrides=["train.max_steps=1"]
    )
    assert "eval_reward" in result.metrics[0]
    assert {"rewards/score_length/mean", "rewards/second_score/mean"} <= set(result.metrics[0])


def test_a_model_object_in_another_precision_than_the_recipes_is_refused(tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["model"]["dtype"] = "float32"
    with pytest.raises(UserError, match="was loaded in bfloat16"):
        grpo_cli.train(tiny_recipe, model=tiny_llama().bfloat16(), tokenizer=byte_tokenizer())


def test_a_nameless_model_object_needs_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass tokenizer="):
        grpo_cli.train({"train": {"output_dir": str(tmp_path / "run"), "max_steps": 1}}, model=tiny_llama())


def test_an_optimizer_without_its_model_is_refused(tiny_recipe: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD(tiny_llama().parameters(), lr=0.1)
    with pytest.raises(UserError, match="model object"):
        grpo_cli.train(tiny_recipe, optimizer=optimizer)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, grpo_cli, grpo_cli.train, grpo_cli.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
