"""Packs of rows with contexts of their own: beginnings are fed once, and sampled tokens alone are predicted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.algorithm.packing import Group, deal_groups, pack_groups
from tests.algorithm.test_packing import input_tokens, visible_tokens
from tests.trees import distinct_beginnings, sampled_of, tree_groups

letters = st.integers(1, 3)


@st.composite
def groups_of_turns(draw: st.DrawFn) -> list[Group]:
    """Rows of so few kinds of tokens that they share beginnings of all lengths, and plain groups among them."""
    groups, start = [], 0
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(1, 6))
        completions = [draw(st.lists(letters, max_size=5)) for _ in range(number)]
        prompts = draw(st.one_of(st.none(), st.just([])))
        if prompts is not None:
            prompts = [draw(st.lists(letters, min_size=1, max_size=5)) for _ in range(number)]
        sampled = None
        if draw(st.booleans()):
            sampled = [draw(st.lists(st.booleans(), min_size=len(c), max_size=len(c))) for c in completions]
        prompt = draw(st.lists(letters, min_size=1, max_size=4))
        groups.append(Group(prompt, completions, range(start, start + number), sampled, prompts))
        start += number
    return groups


def fed_rows(group: Group) -> list[list[int]]:
    """Each context, and of its completion what comes before the last token that was sampled."""
    rows = []
    for context, completion, sampled in zip(group.contexts, group.completions, sampled_of(group), strict=True):
        last = max((place for place, is_sampled in enumerate(sampled) if is_sampled), default=0)
        rows.append([*context, *completion[:last]])
    return rows


def by_sample(groups: list[Group]) -> dict[int, tuple[list[int], list[int], list[bool]]]:
    """Context, completion and which of its tokens were sampled."""
    return {
        sample: (list(context), list(completion), sampled)
        for group in groups
        for sample, context, completion, sampled in zip(
            group.samples, group.contexts, group.completions, sampled_of(group), strict=True
        )
    }


@settings(max_examples=120, deadline=None)
@given(groups_of_turns(), st.integers(1, 40), st.booleans())
def test_each_sampled_token_is_predicted_from_its_context_and_what_comes_before_it(
    groups: list[Group], budget: int, shared_prompt: bool
) -> None:
    rows = by_sample(groups)
    packs = pack_groups(groups, budget, shared_prompt=shared_prompt)
    assert sorted(sample for pack in packs for sample in pack.samples.tolist()) == sorted(rows)
    for pack in packs:
        contexts = iter(visible_tokens(pack))
        assert input_tokens(pack, shared_prompt) <= budget or len(pack.samples) == 1
        for sample, targets, mask in zip(pack.samples.tolist(), pack.targets, pack.mask, strict=True):
            context, completion, sampled = rows[sample]
            assert targets[: len(completion)].tolist() == completion, "a column for every token"
            assert mask.tolist() == [*sampled, *[False] * (len(mask) - len(sampled))]
            for place, is_sampled in enumerate(sampled):
                if is_sampled:
                    assert next(contexts) == [*context, *completion[:place]]
        assert next(contexts, None) is None
        assert torch.equal(pack.mask.flatten().nonzero().squeeze(1), pack.places)
        assert torch.equal(pack.columns[pack.column_places], pack.predictors % pack.input_ids.shape[1])


@settings(max_examples=100, deadline=None)
@given(groups_of_turns())
def test_a_wide_budget_feeds_each_beginning_once_and_nothing_behind_the_last_sampled_token(
    groups: list[Group],
) -> None:
    (pack,) = pack_groups(groups, 10_000)
    fed = 0
    for group in groups:
        rows = fed_rows(group)
        prompt = len(group.prompt)
        is_tree = group.prompts is not None
        fed += distinct_beginnings(rows) if is_tree else prompt + sum(len(row) - prompt for row in rows)
    assert pack.input_ids.shape == (1, fed)


@pytest.mark.parametrize("seed", range(5))
def test_plain_rows_of_turns_are_padded_to_the_longest_fed_row(seed: int) -> None:
    groups = tree_groups(seed)
    rows = [row for group in groups for row in fed_rows(group)]
    (pack,) = pack_groups(groups, 10_000, shared_prompt=False)
    assert pack.input_ids.shape == (len(rows), max(map(len, rows)))
    assert pack.attention_mask is not None
    assert sorted(pack.attention_mask.sum(1).tolist()) == sorted(map(len, rows))


def test_plain_rows_of_one_group_are_packed_by_their_own_lengths() -> None:
    group = Group([1], [[5, 6], [7, 8], [9, 9]], [0, 1, 2], prompts=[[1], [1] * 9, [2]])
    packs = pack_groups([group], 10, shared_prompt=False)
    assert [sorted(pack.samples.tolist()) for pack in packs] == [[1], [0, 2]]


def test_the_turns_of_one_beginning_stay_in_one_part() -> None:
    one, other = [1] * 6, [2] * 6
    turns = [one, other, [*one, 7], [*other, 7]]
    group = Group([1], [[8, 9]] * 4, range(4), prompts=turns)
    packs = pack_groups([group], 10)
    assert [sorted(pack.samples.tolist()) for pack in packs] == [[0, 2], [1, 3]]
    assert sum(pack.input_ids.numel() for pack in packs) == 2 * (6 + 1 + 2)


def test_groups_are_dealt_by_the_tokens_that_their_trees_have() -> None:
    chain = Group([1], [[5]] * 9, range(9), prompts=[[1] * 10] * 9)
    rows = Group([1], [[5] * 11] * 2, range(9, 11))
    small = Group([1], [[5] * 12], [11])
    assert deal_groups([chain, rows, small], 2) == [[rows], [chain, small]]


def test_a_pack_in_which_nothing_was_sampled_predicts_nothing() -> None:
    group = Group([1], [[5, 6], [7]], [0, 1], [[False, False], [False]], [[1, 2], [1, 3]])
    for shared_prompt in (True, False):
        (pack,) = pack_groups([group], 100, shared_prompt=shared_prompt)
        assert pack.mask.shape == (2, 2)
        assert not pack.mask.any()
        assert pack.predictors.numel() == 0


def test_a_prompt_given_for_each_row_is_the_same_computation_in_another_order() -> None:
    """What `prompts` says of a plain group adds nothing but the beginnings that completions have in common."""
    plain = Group([1, 2], [[9, 5], [3, 4, 4]], [0, 1])
    tree = Group([1, 2], [[9, 5], [3, 4, 4]], [0, 1], prompts=[[1, 2], [1, 2]])
    one, other = (pack_groups([group], 100)[0] for group in (plain, tree))
    assert one.input_ids.tolist() == [[1, 2, 9, 3, 4]]
    assert other.input_ids.tolist() == [[1, 2, 3, 4, 9]]
    assert torch.equal(one.samples, other.samples)
    assert torch.equal(one.targets, other.targets)
    assert visible_tokens(one) == visible_tokens(other)
