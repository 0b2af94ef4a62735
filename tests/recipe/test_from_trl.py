"""The page for who comes from TRL is true: about ours by the schema, about TRL by TRL, where it is installed."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.recipe.from_trl import TABLE, default_of, from_trl_page, read_table
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.messages import all_keys
from grpo_cli.recipe.schema import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "from_trl.md"
PLACES = ("key", "how", "not_needed", "not_there")
EMPTY = (None, "", [], {})

TRL = importlib.util.find_spec("trl")
"""Of its trainer only the source is read: importing it imports vLLM, too."""

needs_trl = pytest.mark.skipif(TRL is None, reason="TRL is not installed")


@cache
def table() -> dict[str, Any]:
    return read_table()


def rows(of: str | None = None) -> dict[str, dict[str, Any]]:
    sections = [section for section in table()["sections"] if of in (None, section["of"])]
    return {name: row for section in sections for name, row in section["arguments"].items()}


def texts() -> Iterator[str]:
    yield table()["introduction"]
    for row in rows().values():
        yield from (value for value in row.values() if isinstance(value, str))


def code_block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", table()["introduction"], re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def arguments_of_the_script() -> dict[str, Any]:
    calls = [node for node in ast.walk(ast.parse(code_block("python"))) if isinstance(node, ast.Call)]
    config = next(call for call in calls if ast.unparse(call.func) == "GRPOConfig")
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in config.keywords}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "near_20.yaml"
    path.write_text(code_block("yaml"), encoding="utf-8")
    return load_recipe(path, [])


def value_at(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), recipe)


def test_the_page_in_docs_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == from_trl_page(), "run `make docs`"


def test_an_argument_has_exactly_one_place() -> None:
    for name, row in rows().items():
        assert len(row.keys() & {*PLACES}) == 1, name
        assert row.keys() <= {"default", "note", "differs", "here", "alike", *PLACES}, name
        assert "|" not in "".join(value for value in row.values() if isinstance(value, str)), (
            f"{name}: ends the cell"
        )


def test_every_key_that_the_page_names_is_one_of_the_schema() -> None:
    known = {".".join(str(part) for part in key if part != 0) for key in all_keys()}
    sections = "|".join(name for name in Recipe.model_fields)
    named = {key for text in texts() for key in re.findall(rf"`((?:{sections})\.[\w.]+)", text)}
    named |= {row["key"].replace(".0.", ".") for row in rows().values() if "key" in row}
    assert len(named) > 50
    assert named <= known


def test_a_default_of_ours_that_is_not_trls_is_explained() -> None:
    for name, row in rows().items():
        if "key" in row:
            ours = default_of(row["key"])
            same = row["default"] == ours or (row["default"] in EMPTY and ours in EMPTY)
            assert same or "differs" in row or "alike" in row, name
            assert not (same and "alike" in row), name


def test_a_default_is_the_schemas() -> None:
    assert default_of("loss.beta") == 0.0
    assert default_of("rewards.0.weight") == 1.0
    assert default_of("loss.sampler_correction.mode") == "token_truncate"
    with pytest.raises(KeyError):
        default_of("loss.betta")


def test_the_recipe_on_the_page_says_what_the_script_says(recipe: Recipe) -> None:
    trl, script = rows("GRPOConfig") | rows("TrainingArguments"), arguments_of_the_script()
    for name, value in script.items():
        if "key" in trl[name]:
            assert value_at(recipe, trl[name]["key"]) == value, name
    completions = script["per_device_train_batch_size"] * script["gradient_accumulation_steps"]
    assert recipe.train.prompts_per_step * script["num_generations"] == completions
    assert recipe.loss.bias_corrected_kl == trl["use_bias_correction_kl"]["default"]
    assert recipe.model.gradient_checkpointing == trl["gradient_checkpointing"]["default"]


def test_no_argument_stands_in_the_table_twice() -> None:
    names = re.findall(r"^ {6}(\w+):", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(name for section in table()["sections"] for name in section["arguments"])


@pytest.mark.slow
@needs_trl
def test_every_argument_that_grpo_config_defines_is_on_the_page_and_no_other() -> None:
    from trl import GRPOConfig

    assert rows("GRPOConfig").keys() == vars(GRPOConfig)["__annotations__"].keys()


@needs_trl
def test_every_argument_of_the_trainer_is_on_the_page_and_no_other() -> None:
    assert TRL is not None
    assert TRL.submodule_search_locations is not None
    source = Path(TRL.submodule_search_locations[0], "trainer", "grpo_trainer.py").read_text(encoding="utf-8")
    trainer = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "GRPOTrainer")
    init = next(node for node in ast.walk(trainer) if getattr(node, "name", "") == "__init__")
    assert isinstance(init, ast.FunctionDef)
    assert rows("GRPOTrainer").keys() == {argument.arg for argument in init.args.args} - {"self"}


@pytest.mark.slow
@needs_trl
@pytest.mark.parametrize("of", ["GRPOConfig", "TrainingArguments"])
def test_the_defaults_that_the_page_says_are_trls(of: str) -> None:
    from trl import GRPOConfig

    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert {name: row["default"] for name, row in rows(of).items()} == {name: defaults[name] for name in rows(of)}


@pytest.mark.slow
@needs_trl
def test_trl_takes_the_script_on_the_page(tmp_path: Path) -> None:
    from trl import GRPOConfig

    config = GRPOConfig(
        **arguments_of_the_script() | {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    )
    assert config.generation_batch_size == 64
