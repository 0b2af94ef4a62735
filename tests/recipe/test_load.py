from __future__ import annotations

import contextlib
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.recipe.load import dump_recipe, load_recipe
from grpo_cli.recipe.raw import RecipeError
from tests.recipe.recipes import PLAIN, errors, load, plain

ROOT = Path(__file__).parents[2]

# Errors: all of them, in the order of the file, each with its line


def test_all_errors_come_at_once_in_the_order_of_the_file(file: Path) -> None:
    text = """\
train: {output_dir: run, max_steps: many}
loss:
  epsilom: 0.1
  delta: 0.5
  type: cispo
data: {name: d.jsonl, long_prompts: error}
modle: {name: m}
rewards:
  - {path: my:score, wieght: 2}
  - {}
"""
    assert errors(file, text) == [
        "recipe.yaml:1: train.max_steps must be a whole number, not the string 'many'",
        "recipe.yaml:3: loss.epsilom is not a setting; did you mean loss.epsilon?",
        "recipe.yaml:4: loss.delta is not used by type cispo; remove it",
        "recipe.yaml:6: data.long_prompts does nothing without data.max_prompt_tokens; set it too",
        "recipe.yaml:7: modle is not a setting; did you mean model?",
        "recipe.yaml:9: rewards.0.wieght is not a setting; did you mean rewards.0.weight?",
        "recipe.yaml:10: rewards.1 needs exactly one of path (module:function) and model (a reward model)",
        "recipe.yaml: model is missing",
    ]


def test_a_broken_value_hides_the_contradictions_that_it_takes_part_in_and_no_others(file: Path) -> None:
    text = PLAIN + "  eval_every: x\nmodel2: 3\noptim: {scheduler: constant, warmup_ratio: 0.5}\n"
    assert [line.split(": ")[1].split()[0] for line in errors(file, text)] == [
        "train.eval_every",
        "model2",
        "optim.scheduler",
    ]


# A mapping and a Recipe


def test_a_mapping_is_checked_like_a_file_and_left_as_it_is() -> None:
    values = plain(loss={"beta": 0.1})
    recipe = load_recipe(values, ["loss.beta=0.2", "rewards.0.weight=2"])
    assert (recipe.loss.beta, recipe.rewards[0].weight) == (0.2, 2)
    assert values == plain(loss={"beta": 0.1})
    with pytest.raises(RecipeError, match=r"^recipe: loss\.betta is not a setting; did you mean loss\.beta\?$"):
        load_recipe(plain(loss={"betta": 1}))


def test_a_recipe_object_takes_overrides_too() -> None:
    recipe = load_recipe(plain())
    assert load_recipe(recipe) == recipe
    assert load_recipe(recipe, ["train.seed=7"]).train.seed == 7
    assert recipe.train.seed == 42


# Writing a recipe


RICH = plain(
    model={
        "name": "m",
        "revision": "1234e567",
        "lora": {"target_modules": ["q_proj", "no"]},
        "chat_template": "{{ x }}\n",
    },
    data={
        "name": "d",
        "columns": {"q": "prompt"},
        "prompt_template": "é: {q}\n\n  - x",
        "eval": {"name": "e", "limit": 3},
    },
    rewards=[
        {
            "path": "a:b",
            "params": {"x": [1, 2.5, None, "1e-6", "no", "2024-05-01", "1:30", True], "y": {"z": 1e-7}},
        }
    ],
    generation={"stop": ["\n", "null", "~", "1", "0x1", ".5", "1_0", ": ", "# "]},
    optim={"learning_rate": 1e-6, "betas": [0.9, 0.95]},
    train={"output_dir": "run: 1", "epochs": 0.5},
    logging={"trackers": []},
)


def test_a_written_recipe_loads_back_to_an_equal_one(file: Path) -> None:
    recipe = load_recipe(RICH)
    assert load(file, dump_recipe(recipe)) == recipe
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump(mode="json"), "by other YAML readers too"


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.text(
    "0123456789.:-+_eExn~", max_size=8
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(params=st.dictionaries(texts, values, max_size=3), name=texts.filter(bool), number=st.floats(1e-12, 1e12))
def test_whatever_is_in_a_recipe_survives_being_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, params: dict[str, Any], name: str, number: float
) -> None:
    rewards = [{"path": "a:b", "name": name, "params": params}]
    recipe = load_recipe(plain(rewards=rewards, optim={"learning_rate": number}))
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(file) == recipe


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_no_text_of_a_value_is_taken_for_another_value_when_quoted(text: str) -> None:
    recipe = load_recipe(plain(data={"name": "d", "system_prompt": text}))
    assert yaml.safe_load(dump_recipe(recipe))["data"]["system_prompt"] == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(string.printable, max_size=40) | st.text(max_size=20))
def test_any_text_is_a_recipe_or_a_readable_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(RecipeError):
        load_recipe(file)
    with contextlib.suppress(RecipeError):
        load_recipe(plain(), [text])


# Shipped recipes and keys


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_load_and_write(path: Path, file: Path) -> None:
    recipe = load_recipe(path)
    assert load(file, dump_recipe(recipe)) == recipe
