"""`grpo eval` closes what it starts, and starts nothing for a recipe that it then refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import Recipe
from grpo_cli.verbs import evaluate


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"garbage")
    return folder


def evaluated(recipe: dict[str, Any], model: Path, **sections: Any) -> None:
    data = recipe["data"] | {"eval": recipe["data"]}
    values = recipe | {"data": data, "model": recipe["model"] | sections}
    evaluate.eval_model(Recipe.model_validate(values), str(model), [], 1.0, True, Console(quiet=True))


def test_an_adapter_for_a_recipe_without_one_is_refused_before_anything_is_started(
    tiny_recipe: dict[str, Any], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "assemble", lambda *_, **__: pytest.fail("a server would run now"))
    with pytest.raises(UserError, match=r"is a LoRA checkpoint, and the recipe has no model\.lora"):
        evaluated(tiny_recipe, adapter)


def test_the_engine_is_closed_when_the_adapter_cannot_be_loaded(
    tiny_recipe: dict[str, Any], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble, closed = evaluate.assemble, []

    def assembled(*arguments: Any, **options: Any) -> Any:
        rollouts, learner = assemble(*arguments, **options)
        monkeypatch.setattr(rollouts.engine, "close", lambda: closed.append(True))
        return rollouts, learner

    monkeypatch.setattr(evaluate, "assemble", assembled)
    with pytest.raises(UserError, match="the adapter cannot be loaded"):
        evaluated(tiny_recipe, adapter, lora={"r": 2})
    assert closed == [True]
