"""A tree of sequences holds each beginning once, and each of its tokens sees its own beginning alone."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.algorithm.branches import Branches, SortedRows, Stem, branches_of
from tests.trees import depth_of, distinct_beginnings, tree_row

few_letters = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=8), min_size=1, max_size=9)
"""Sequences of so few kinds of tokens that they share beginnings of all lengths; some begin others, or are one."""


@settings(max_examples=120, deadline=None)
@given(few_letters, st.integers(0, 5), st.one_of(st.none(), st.integers(1, 6)))
def test_a_token_sees_its_own_beginning_and_each_beginning_is_there_once(
    rows: list[list[int]], start: int, window: int | None
) -> None:
    tree = SortedRows.of(rows).tree(start)
    beginnings: dict[int, list[int]] = {}
    for row, path in zip(rows, tree.paths, strict=True):
        assert [tree.tokens[place - start] for place in path] == row
        for end, place in enumerate(path, start=1):
            assert beginnings.setdefault(place, row[:end]) == row[:end]
    assert sorted(beginnings) == list(range(start, start + len(tree.tokens)))
    assert len(tree.tokens) == SortedRows.of(rows).num_tokens == distinct_beginnings(rows)
    branches = Branches.of([Stem(0, start, (), 0, start)] * (start > 0) + tree.stems)
    assert branches.positions[start:].tolist() == [len(beginnings[place]) - 1 for place in sorted(beginnings)]
    places = torch.arange(start + len(tree.tokens))
    seen = branches.sees(places[:, None], places, window)
    for query, of_query in beginnings.items():
        for key in range(len(places)):
            of_key = beginnings.get(key)
            is_before = of_key is not None and of_query[: len(of_key)] == of_key
            is_near = of_key is not None and (window is None or len(of_query) - len(of_key) < window)
            assert seen[query, key] == (is_before and is_near)


@settings(max_examples=100, deadline=None)
@given(few_letters)
def test_stems_and_their_branches_fill_the_row_and_each_stem_parts_into_two_or_more(rows: list[list[int]]) -> None:
    stems = SortedRows.of(rows).tree(0).stems
    assert stems[0].start == 0
    for stem, following in pairwise(stems):
        assert stem.branches_end == following.start
    assert stems[-1].branches_end == stems[-1].end == max(stem.end for stem in stems)
    for number, stem in enumerate(stems):
        inside = [other for other in stems[number + 1 :] if other.start < stem.end]
        assert all(other.end <= stem.end and other.position >= stem.position + stem.length for other in inside)
        children = [other for other in inside if other.position == stem.position + stem.length]
        assert len(children) + len(stem.branch_lengths) != 1
        assert min(stem.length, *stem.branch_lengths, 1) == 1


@settings(max_examples=100, deadline=None)
@given(few_letters, st.integers(1, 30))
def test_parts_within_a_budget_hold_each_sequence_once(rows: list[list[int]], budget: int) -> None:
    parts = list(SortedRows.of(rows).within(budget))
    assert sorted(place for part in parts for place in part) == list(range(len(rows)))
    for part in parts:
        tokens = distinct_beginnings([rows[place] for place in part])
        assert tokens <= budget or len(part) == 1
    order = SortedRows.of(rows).order
    assert [sorted(part) for part in parts] == parts
    for part, following in pairwise(parts):
        added = min(following, key=order.index)
        assert distinct_beginnings([rows[place] for place in (*part, added)]) > budget, "filled up"


def test_a_chain_of_turns_is_one_stem() -> None:
    """A history that is kept: each row goes on from the last."""
    rows = [[7] * length for length in (3, 5, 9)]
    tree = SortedRows.of(rows).tree(0)
    assert tree.tokens == [7] * 9
    assert tree.stems == [Stem(0, 9, (), 0, 9)]


def test_branches_come_before_the_stems_that_go_on() -> None:
    tree = SortedRows.of([[1, 2, 3], [1, 2, 4], [1, 5], [1, 0]]).tree(10)
    assert tree.tokens == [1, 0, 5, 2, 3, 4]
    assert tree.stems == [Stem(10, 1, (1, 1), 0, 16), Stem(13, 1, (1, 1), 1, 16)]
    assert tree.paths == [[10, 13, 14], [10, 13, 15], [10, 12], [10, 11]]


def test_sequences_with_nothing_in_common_are_stems_of_their_own() -> None:
    tree = SortedRows.of([[4, 4], [2], [9, 1], [9, 2]]).tree(0)
    assert tree.stems == [Stem(0, 1, (), 0, 1), Stem(1, 2, (), 0, 3), Stem(3, 1, (1, 1), 0, 6)]


def test_no_sequences_make_an_empty_tree() -> None:
    nothing = SortedRows.of([])
    assert nothing.num_tokens == 0
    assert list(nothing.within(5)) == []


def test_a_thousand_turns_that_part_one_from_the_other_are_no_recursion_too_deep() -> None:
    rows = [[1] * length + [2] for length in range(1, 1500)]
    draw = random.Random(0)
    draw.shuffle(rows)
    tree = SortedRows.of(rows).tree(0)
    assert len(tree.tokens) == 1499 + 1499
    assert depth_of(Branches.of(tree.stems[-3:])) <= 4


@pytest.mark.parametrize("seed", range(6))
def test_the_random_trees_of_other_tests_are_of_depth_four_or_more(seed: int) -> None:
    assert depth_of(tree_row(seed, longest=5)) >= 4


def test_a_row_of_prompts_and_branches_is_what_it_always_was() -> None:
    branches = branches_of([3, 1], [[2, 0, 1], []])
    assert branches.stems == (Stem(0, 3, (2, 1), 0, 6), Stem(6, 1, (), 0, 7))
    assert branches.positions.tolist() == [0, 1, 2, 3, 4, 3, 0]
    assert branches.ends.tolist() == [6, 6, 6, 5, 5, 6, 7]
