from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from grpo_cli.recipe.messages import all_keys
from tests.recipe.recipes import PLAIN, errors, load, plain


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("loss: {epsilom: 1}", "loss.epsilon"),
        ("loss: {Beta: 1}", "loss.beta"),
        ("train2: 1", "train"),
        ("reward: []", "rewards"),
        ("generation: {max_tokens: 1}", "generation.max_completion_tokens"),
        ("generation: {learning_rate: 1}", "optim.learning_rate"),
        ("learning_rate: 1", "optim.learning_rate"),
        ("beta: 1", "loss.beta"),
        ("optim: {output_dirs: x}", "train.output_dir"),
        ("logging: {num_generations: 2}", "generation.num_generations"),
    ],
)
def test_an_unknown_key_names_the_nearest_one_of_its_section_or_of_another(
    file: Path, written: str, meant: str
) -> None:
    (line,) = errors(file, PLAIN + written)
    assert line.startswith("recipe.yaml:10: ")
    assert line.endswith(f"is not a setting; did you mean {meant}?")


def test_an_unknown_key_of_a_list_item_is_named_with_its_index(file: Path) -> None:
    text = PLAIN.replace("- my:score", "- my:score\n  - {path: my:other, parms: {}}")
    (line,) = errors(file, text)
    assert line == "recipe.yaml:7: rewards.1.parms is not a setting; did you mean rewards.1.params?"


def test_an_unknown_key_like_no_other_gets_the_keys_of_its_section(file: Path) -> None:
    text = PLAIN.replace("name: m", "name: m\n  lora: {rank: 8}")
    assert errors(file, text) == [
        "recipe.yaml:3: model.lora.rank is not a setting; "
        "model.lora has r, alpha, dropout, target_modules, modules_to_save"
    ]
    (line,) = errors(file, PLAIN + "xyz: 1")
    assert line.startswith("recipe.yaml:10: xyz is not a setting; a recipe has model, data, rewards, ")


@pytest.mark.parametrize("key", ["str", "list", "RewardConfig"])
def test_an_unknown_key_is_named_even_if_it_is_the_name_of_a_type(file: Path, key: str) -> None:
    (line,) = errors(file, PLAIN + f"loss: {{{key}: 1}}")
    assert line.startswith(f"recipe.yaml:10: loss.{key} is not a setting")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {beta: many}", "loss.beta must be a number, not the string 'many'"),
        ("loss: {beta: true}", "loss.beta must be a number, not true"),
        ("loss: {beta: null}", "loss.beta must be a number, not empty"),
        ("loss: {beta: [1]}", "loss.beta must be a number, not a list"),
        ("loss: {beta: {x: 1}}", "loss.beta must be a number, not a mapping"),
        ("loss: {beta: -1}", "loss.beta is -1; it should be greater than or equal to 0"),
        ("loss: {beta: .nan}", "loss.beta is nan; it should be a finite number"),
        ("loss: {mask_truncated: 1}", "loss.mask_truncated must be true or false, not 1"),
        (
            "loss: {type: dr-grpo}",
            "loss.type is 'dr-grpo'; it must be one of 'grpo', 'bnpo', 'dr_grpo', 'dapo', 'luspo', 'cispo', "
            "'sapo', 'vespo', or module:function of your own; did you mean 'dr_grpo'?",
        ),
        (
            "loss: {type: 3}",
            "loss.type is 3; it must be one of 'grpo', 'bnpo', 'dr_grpo', 'dapo', 'luspo', 'cispo', 'sapo', "
            "'vespo', or module:function of your own",
        ),
        ("loss: dapo", "loss must be a section with keys of its own, not the string 'dapo'"),
        ("loss:", "loss must be a section with keys of its own, not empty"),
        ("generation: {top_k: 1.5}", "generation.top_k must be a whole number, not 1.5"),
        ("generation: {stop: END}", "generation.stop must be a list, not the string 'END'"),
        ("generation: {stop: ['']}", "generation.stop.0 is ''; it should have at least 1 character"),
        ("optim: {betas: [0.9]}", "optim.betas.1 is missing"),
        ("optim: {betas: [0.9, 0.9, 0.9]}", "optim.betas has more than 2 entries"),
        ("optim: {betas: 0.9}", "optim.betas must be a list, not 0.9"),
        ("optim: {params: [1]}", "optim.params must be a mapping, not a list"),
        ("logging: {trackers: [1]}", "logging.trackers.0 must be a string, not 1"),
        ("1: 2", "1 is not a setting; keys are words"),
    ],
)
def test_a_wrong_value_says_what_it_is_and_what_it_must_be(file: Path, text: str, message: str) -> None:
    assert errors(file, PLAIN + text) == [f"recipe.yaml:10: {message}"]


@pytest.mark.parametrize("value", ["3", "[3]", "[a, 3]"])
def test_a_setting_of_two_kinds_is_one_error(file: Path, value: str) -> None:
    text = PLAIN.replace("name: m", f"name: m\n  lora: {{target_modules: {value}}}")
    assert errors(file, text) == ["recipe.yaml:3: model.lora.target_modules must be a string or a list of strings"]


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", '"a\\0b"', "x" * 256, "é" * 128])
def test_a_path_that_no_file_can_have_is_refused(file: Path, name: str) -> None:
    for key in ("model: {name: m", "data: {name: d", "train: {output_dir: r, max_steps: 1"):
        section, _, rest = key.partition(": {")
        recipe = plain()
        del recipe[section]
        first, _, others = rest.partition(",")
        text = (
            yaml.safe_dump(recipe) + f"{section}: {{{first.split(':')[0]}: {name}{',' if others else ''}{others}}}"
        )
        (line,) = errors(file, text)
        assert "; it should " in line


def test_every_key_of_the_schema_can_be_found() -> None:
    keys = {".".join(map(str, key)) for key in all_keys()}
    assert {"model.lora.r", "data.eval.split", "rewards.0.weight", "train.max_steps", "logging.trackers"} <= keys
    assert len(keys) > 90


def test_numbers_are_finite(file: Path) -> None:
    assert errors(file, PLAIN + "optim: {learning_rate: .inf}") == [
        "recipe.yaml:10: optim.learning_rate is inf; it should be a finite number"
    ]
    assert not math.isinf(load(file, PLAIN + "optim: {learning_rate: 1e300}").optim.learning_rate)
