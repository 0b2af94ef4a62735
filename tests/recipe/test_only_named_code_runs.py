"""Nothing that a recipe or a data set holds is executed but what the sections for it name by a dotted path."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from rich.console import Console

from grpo_cli.errors import UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.messages import all_keys, section_of
from grpo_cli.recipe.raw import KeyPath
from grpo_cli.recipe.schema import Recipe
from grpo_cli.verbs.check import check

NAMES_CODE = {
    "data.name", "data.eval.name", "rewards.0.path", "episode.tools", "episode.environment",
    "episode.environment.path", "loss.type", "optim.name", "train.callbacks",
}  # fmt: skip
"""The keys whose pages say that they take `module:name`."""

TEXTS = (
    "evil:touch",
    "evil",
    "evil.touch",
    "!!python/object/apply:evil.touch []",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{answer.__class__.__init__.__globals__}",
    "$(touch ran)",
    "`touch ran`; touch ran",
    "__import__('evil')",
)


def annotation_of(key: KeyPath) -> Any:
    model: Any = Recipe
    annotation: Any = Recipe
    for part in key:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        found = section_of(annotation)
        model = found[0] if found else model
    return annotation


def values_of(annotation: Any, text: str) -> list[Any]:
    """What a field of that type may be when it is made of `text`."""
    shown = str(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return []
    values: list[Any] = []
    if "str" in shown and "list" not in shown and "dict" not in shown and "Literal" not in shown:
        values.append(text)
    if "list[" in shown and not any(section_of(part) for part in get_args(annotation)):
        values.append([text])
    if "dict[" in shown:
        values.append({"x": text, text: text})
    return values


OTHER_KEYS = [
    (".".join(map(str, key)), value)
    for key in all_keys()
    if ".".join(map(str, key)) not in NAMES_CODE
    for text in TEXTS
    for value in values_of(annotation_of(key), text)
]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\ndef touch(*args, **kwargs): open('ran', 'w')\n")
    (tmp_path / "sound.py").write_text("def score(completions, **columns): return [0.0] * len(completions)\n")
    rows = [{"prompt": text, "answer": text, text: [{"x": text}]} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def look(*overrides: str) -> None:
    values = {
        "model": {"name": "m"},
        "data": {"name": "rows.jsonl"},
        "rewards": [{"path": "sound:score"}],
        "train": {"output_dir": "run", "max_steps": 1},
    }
    check(load_recipe(values, overrides), Console(file=StringIO()))


def test_what_the_sections_name_is_executed(world: Path) -> None:
    with pytest.raises(UserError):
        look("rewards.0.path=evil:touch")
    assert (world / "ran").exists(), "or the test below could not fail"
    sys.modules.pop("evil")


def test_no_other_text_of_a_recipe_or_a_data_set_is_executed(world: Path) -> None:
    assert len({key for key, _ in OTHER_KEYS}) > 25
    look()
    accepted = 0
    for key, value in OTHER_KEYS:
        overrides = [f"{key}={json.dumps(value)}"]
        if key.startswith("data.eval."):
            overrides.insert(0, "data.eval.name=rows.jsonl")
        try:
            look(*overrides)
            accepted += 1
        except UserError:
            pass
        assert "evil" not in sys.modules, (key, value)
        assert not (world / "ran").exists(), (key, value)
    assert accepted > 30


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
@pytest.mark.parametrize(
    "arguments", [{"worker_cls": "evil.touch"}, {"kv_transfer_config": {"kv_connector_module_path": "evil"}}]
)
def test_vllm_is_handed_no_code_to_run(world: Path, engine: str, arguments: dict[str, Any]) -> None:
    server = ["generation.server.spawn=true"] if engine == "vllm_server" else []
    (name,) = arguments
    with pytest.raises(UserError, match=rf"generation\.vllm\.{name} names code for vLLM to run"):
        look(f"generation.engine={engine}", *server, f"generation.vllm={json.dumps(arguments)}")
    assert "evil" not in sys.modules
