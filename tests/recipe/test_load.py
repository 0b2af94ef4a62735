from __future__ import annotations

import contextlib
import math
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.recipe.load import RecipeError, all_keys, dump_recipe, load_recipe
from grpo_cli.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]

PLAIN = """\
model:
  name: m
data:
  name: d.jsonl
rewards:
  - my:score
train:
  output_dir: run
  max_steps: 2
"""
"""What a test appends begins at line 10."""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path to write a recipe to; messages call it recipe.yaml."""
    monkeypatch.chdir(tmp_path)
    return Path("recipe.yaml")


def load(file: Path, text: str, *overrides: str) -> Recipe:
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides)


def errors(file: Path, text: str | bytes, *overrides: str) -> list[str]:
    """The lines of the message that a recipe ends in."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return str(caught.value).splitlines()


def plain(**sections: Any) -> dict[str, Any]:
    return yaml.safe_load(PLAIN) | sections


# YAML as its readers mean it


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("3.0e-5", 3e-5), ("1.e-6", 1e-6), (".5", 0.5), ("0.5", 0.5), ("1e+1", 10.0)],
)
def test_a_number_with_an_exponent_is_a_number(file: Path, text: str, number: float) -> None:
    assert load(file, PLAIN + f"optim: {{learning_rate: {text}}}").optim.learning_rate == number


def test_a_whole_number_will_do_where_a_number_is_wanted(file: Path) -> None:
    assert load(file, PLAIN + "loss: {beta: 1}").loss.beta == 1


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "No", "Off", "y", "N"])
def test_words_that_old_yaml_takes_for_booleans_stay_words(file: Path, word: str) -> None:
    assert load(file, PLAIN.replace("name: m", f"name: {word}")).model.name == word


@pytest.mark.parametrize("word", ["true", "True", "TRUE"])
def test_true_is_true(file: Path, word: str) -> None:
    assert load(file, PLAIN.replace("name: m", f"name: m\n  trust_remote_code: {word}")).model.trust_remote_code


@pytest.mark.parametrize(
    "text", ["2024-05-01", "2024-99-99", "1:30", "12:30:45", "0o17", "010", "1.2.3", "12e34x"]
)
def test_dates_times_and_revisions_stay_text(file: Path, text: str) -> None:
    assert load(file, PLAIN.replace("name: m", f"name: m\n  revision: {text}")).model.revision == text


@pytest.mark.parametrize(("text", "number"), [("1_000", 1000), ("0x10", 16), ("+5", 5), ("0b11", 3)])
def test_whole_numbers_may_be_written_in_yaml_s_other_ways(file: Path, text: str, number: int) -> None:
    assert load(file, PLAIN + f"  seed: {text}").train.seed == number


def test_null_is_empty(file: Path) -> None:
    recipe = load(file, PLAIN + "  eval_every: null\n  epochs: ~\n  max_tokens_per_microbatch:")
    assert (recipe.train.eval_every, recipe.train.epochs, recipe.train.max_tokens_per_microbatch) == (
        None,
        None,
        None,
    )


def test_anchors_merge(file: Path) -> None:
    text = PLAIN.replace("  name: d.jsonl", "  name: d.jsonl\n  columns: &renames {q: prompt}")
    recipe = load(
        file, text.replace("rewards:", "  eval: {name: e.jsonl, columns: {<<: *renames, a: gold}}\nrewards:")
    )
    assert recipe.data.eval is not None
    assert recipe.data.eval.columns == {"q": "prompt", "a": "gold"}


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode())
    assert load_recipe(file) == load_recipe(plain())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN + "loss: {}\nloss: {}\n", "recipe.yaml:11: loss is set twice (first at recipe.yaml:10)"),
        (PLAIN + "  max_steps: 3\n", "recipe.yaml:10: train.max_steps is set twice (first at recipe.yaml:9)"),
        (PLAIN + "loss: {beta: 1, beta: 1}\n", "recipe.yaml:10: loss.beta is set twice (first at recipe.yaml:10)"),
        (PLAIN.replace("  name: m", "\tname: m"), "recipe.yaml:2: not valid YAML: found character '\\t'"),
        (PLAIN + "loss: [1\n", "recipe.yaml:11: not valid YAML: "),
        (PLAIN + "loss: \x07\n", "recipe.yaml:10: not valid YAML: the character '\\x07'"),
        (PLAIN + "---\nloss: {}\n", "recipe.yaml:10: not valid YAML: but found another document"),
        (PLAIN + "? [a, b]\n: c\n", "recipe.yaml:10: not valid YAML: found unhashable key"),
        (PLAIN + "loss: *nowhere\n", "recipe.yaml:10: not valid YAML: found undefined alias"),
        (PLAIN + "loss: !!int x\n", "recipe.yaml:10: not valid YAML: 'x' is not a value of int"),
        (PLAIN + "loss: !!timestamp x\n", "recipe.yaml:10: not valid YAML: 'x' is not a value of timestamp"),
        (PLAIN + f"loss: {'9' * 5000}\n", "recipe.yaml:10: not valid YAML: '9999"),
        (PLAIN + "loss: !!python/name:os.system\n", "recipe.yaml:10: not valid YAML: could not determine"),
        (PLAIN + "loss: &a [*a]\n", "recipe.yaml: nested too deeply, or an anchor (&) that contains itself"),
        ("", "recipe.yaml: a recipe is a mapping of sections"),
        ("# nothing yet\n", "recipe.yaml: a recipe is a mapping of sections"),
        ("- model\n", "recipe.yaml: a recipe is a mapping of sections"),
        (b"\xff\xfe", "recipe.yaml: cannot read the recipe: it is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line_with_its_place(file: Path, text: str | bytes, message: str) -> None:
    (line,) = errors(file, text)
    assert line.startswith(message)


def test_a_missing_recipe_and_a_folder_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot read the recipe: No such file or directory"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe: Is a directory"):
        load_recipe(tmp_path)


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


# --set


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


def test_every_key_of_the_schema_can_be_found() -> None:
    keys = {".".join(map(str, key)) for key in all_keys()}
    assert {"model.lora.r", "data.eval.split", "rewards.0.weight", "train.max_steps", "logging.trackers"} <= keys
    assert len(keys) > 90


def test_numbers_are_finite(file: Path) -> None:
    assert errors(file, PLAIN + "optim: {learning_rate: .inf}") == [
        "recipe.yaml:10: optim.learning_rate is inf; it should be a finite number"
    ]
    assert not math.isinf(load(file, PLAIN + "optim: {learning_rate: 1e300}").optim.learning_rate)
