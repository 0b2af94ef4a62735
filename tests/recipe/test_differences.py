"""The comparison of two recipes: complete, key by key, readable."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.recipe.differences import ABSENT, MAX_SHOWN, Difference, differences
from grpo_cli.recipe.load import load_recipe
from tests.recipe.recipes import plain

scalars = st.none() | st.booleans() | st.integers(0, 3) | st.text("ab", max_size=2)
mappings = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xy"), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)


def lines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Of two valid recipes, as `grpo recipe diff` prints them."""
    first, second = (load_recipe(plain(**changes)).model_dump(mode="json") for changes in (before, after))
    return [str(found) for found in differences(first, second)]


def test_each_setting_that_differs_is_one_line_in_the_order_of_the_recipe() -> None:
    before = {"optim": {"learning_rate": 1e-6}, "loss": {"epsilon": 0.2}}
    after = {"loss": {"epsilon": 0.1, "epsilon_high": 0.28}, "data": {"name": "d.jsonl", "system_prompt": "no"}}
    assert lines(before, after) == [
        'data.system_prompt: empty -> "no"',
        "loss.epsilon: 0.2 -> 0.1",
        "loss.epsilon_high: empty -> 0.28",
    ]


def test_what_repeats_a_default_or_stands_in_another_order_is_no_difference() -> None:
    default = load_recipe(plain()).optim.learning_rate
    written = {"optim": {"weight_decay": 0.0, "learning_rate": default}, "rewards": [{"path": "my:score"}]}
    assert lines(written, {}) == []


def test_rewards_are_compared_entry_by_entry_and_other_lists_as_a_whole() -> None:
    before = {"rewards": ["a:b", {"path": "c:d", "params": {"x": 1}}], "optim": {"betas": [0.9, 0.999]}}
    after = {
        "rewards": [{"path": "a:b", "weight": 2}, {"path": "c:d", "params": {"y": None}}, "e:f"],
        "optim": {"betas": [0.9, 0.95]},
    }
    *of_entries, added, betas = lines(before, after)
    assert of_entries == [
        "rewards.0.weight: 1.0 -> 2.0",
        "rewards.1.params.x: 1 -> absent",
        "rewards.1.params.y: absent -> empty",
    ]
    assert added.startswith('rewards.2: absent -> {"path": "e:f", "model": null, ')
    assert betas == "optim.betas: [0.9, 0.999] -> [0.9, 0.95]"
    assert lines(after, before)[3].endswith("} -> absent")


def test_a_section_that_one_side_leaves_empty_is_one_difference() -> None:
    (line,) = lines({}, {"model": {"name": "m", "lora": {"r": 4}}})
    assert line.startswith('model.lora: empty -> {"r": 4, "alpha": 32')


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("two words", '"two words"'),
        ("1e-6", '"1e-6"'),
        ("a\nb", '"a\\nb"'),
        ("\u2028é", '"\\u2028é"'),
        ([], "[]"),
        (True, "true"),
        ({"a": None}, '{"a": null}'),
        (None, "empty"),
        (ABSENT, "absent"),
    ],
)
def test_a_value_is_shown_on_one_line_as_the_reference_writes_it(value: Any, text: str) -> None:
    assert Difference("key", 1, value).texts == ("1", text)


def test_of_two_long_texts_the_place_is_shown_where_they_part() -> None:
    before, after = (f"{'word ' * 200}{end}{' tail' * 200}" for end in ("left", "right"))
    (found,) = differences({"prompt": before}, {"prompt": after})
    first, second = found.texts
    assert (first.startswith("..."), "left" in first, "right" in second) == (True, True, True)
    assert max(map(len, found.texts)) < MAX_SHOWN + 10


@settings(max_examples=200, deadline=None)
@given(before=mappings, after=mappings)
def test_nothing_differs_if_and_only_if_the_values_are_equal(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    found = differences(before, after)
    assert bool(found) == (before != after)
    mirrored = {(one.key, one.after, one.before) for one in differences(after, before) if _is_plain(one)}
    assert {(one.key, one.before, one.after) for one in found if _is_plain(one)} == mirrored


def _is_plain(found: Difference) -> bool:
    return not any(isinstance(side, (list, dict)) for side in (found.before, found.after))
