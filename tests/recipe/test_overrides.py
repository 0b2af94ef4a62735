from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipe.recipes import PLAIN, errors, load


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_steps=3", "train.max_steps", 3),
        ("optim.learning_rate=1e-5", "optim.learning_rate", 1e-5),
        ("model.lora.r=4", "model.lora.r", 4),
        ("model.lora={r: 4}", "model.lora.r", 4),
        ("data.eval.name=e.jsonl", "data.eval.name", "e.jsonl"),
        ("data.system_prompt=a = b", "data.system_prompt", "a = b"),
        ("data.system_prompt='no'", "data.system_prompt", "no"),
        ("model.revision=no", "model.revision", "no"),
        ("generation.stop=[END, '###']", "generation.stop", ["END", "###"]),
        ("rewards.0.weight=2", "rewards.0.weight", 2),
        ("rewards.0=my:other", "rewards.0.path", "my:other"),
        ("rewards.1=my:other", "rewards.1.path", "my:other"),
        ("rewards.1.path=my:other", "rewards.1.path", "my:other"),
        ("rewards=[my:other]", "rewards.0.path", "my:other"),
        ("rewards.0.params.target=20", "rewards.0.params", {"target": 20}),
        (" train.seed =7", "train.seed", 7),
        ("train.eval_every=", "train.eval_every", None),
    ],
)
def test_set_overrides_any_key(file: Path, override: str, key: str, value: Any) -> None:
    found: Any = load(file, PLAIN, override)
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value


def test_the_last_of_two_overrides_wins(file: Path) -> None:
    assert load(file, PLAIN, "train.seed=1", "train.seed=2").train.seed == 2


def test_an_override_can_mend_a_broken_recipe(file: Path) -> None:
    assert load(file, PLAIN + "  seed: x\n", "train.seed=1").train.seed == 1
    assert load(file, PLAIN + "loss:\n", "loss.beta=1").loss.beta == 1
    assert load(file, PLAIN.replace("  max_steps: 2\n", ""), "train.epochs=1").train.epochs == 1


def test_each_override_of_a_list_appends_at_most_one_item(file: Path) -> None:
    recipe = load(file, PLAIN, "rewards.1.path=my:b", "rewards.1.weight=3", "rewards.2=my:c")
    assert [(reward.path, reward.weight) for reward in recipe.rewards] == [
        ("my:score", 1),
        ("my:b", 3),
        ("my:c", 1),
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "write --set key.path=value"),
        ("=3", "write --set key.path=value"),
        (".=3", "write --set key.path=value"),
        ("train..seed=3", "write --set key.path=value"),
        ("train.seed=[1", "the value is not valid YAML"),
        ("train.seed=!!int x", "the value is not valid YAML"),
        (f"train.seed={'[' * 2000}", "the value is not valid YAML"),
        ("rewards.2=my:b", "rewards has 1 entries; write rewards.0 and so on, or rewards.1 to append one"),
        ("rewards.-1=my:b", "rewards has 1 entries; write rewards.0 and so on, or rewards.1 to append one"),
        ("rewards.weight=2", "rewards has 1 entries; write rewards.0 and so on, or rewards.1 to append one"),
        ("rewards.².weight=2", "rewards has 1 entries; write rewards.0 and so on, or rewards.1 to append one"),
        ("train.max_steps.x=1", "train.max_steps has no keys of its own"),
        ("train.max_step=3", "train.max_step is not a setting; did you mean train.max_steps?"),
        ("trian.max_steps=3", "trian is not a setting; did you mean train?"),
        ("train.max_steps=x", "train.max_steps must be a whole number, not the string 'x'"),
        ("train.epochs=1", "train.max_steps says how long to train"),
        ("rewards.1.weight=2", "rewards.1 needs exactly one of path"),
        ("data.eval.split=test", "data.eval.name is missing"),
        ("train=3", "train must be a section with keys of its own, not 3"),
        ("optim.params={a: 1}", "optim.params is for a factory"),
    ],
)
def test_an_error_of_an_override_names_the_override(file: Path, override: str, message: str) -> None:
    place = "recipe.yaml:9" if override == "train.epochs=1" else f"--set {override}"
    (line,) = errors(file, PLAIN, override)
    assert line.startswith(f"{place}: {message}")


def test_errors_of_overrides_come_after_those_of_the_file(file: Path) -> None:
    lines = errors(file, PLAIN + "zzz: 1\n", "train.seed={a: -1}", "loss.betta=1")
    assert [line.split(" is ")[0].split(" must ")[0] for line in lines] == [
        "recipe.yaml:10: zzz",
        "--set train.seed={a: -1}: train.seed",
        "--set loss.betta=1: loss.betta",
    ]
