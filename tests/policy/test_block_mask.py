"""The block mask says of every pair of tokens what the row's branches say, and no pair is ever formed for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_cli.algorithm.branches import Branches, branches_of
from grpo_cli.policy.block_mask import block_mask
from grpo_cli.recipe.limits import MASK_BLOCK, mask_length
from tests.policy.test_attention import HEADS, SCALE, dense, inputs

Row = tuple[list[int], list[list[int]]]

ROWS: dict[str, Row] = {
    "one token": ([1], [[]]),
    "a lone prompt": ([700], [[]]),
    "a bucket to the brim": ([128], [[128, 128, 128]]),
    "ends on block boundaries": ([256, 128], [[128, 127], [129, 128]]),
    "one token over": ([129], [[127, 129]]),
    "many short branches": ([30], [[3] * 200]),
    "many short groups": ([5] * 60, [[2, 4, 1]] * 60),
    "long branches": ([100], [[900, 700]]),
    "prompts alone": ([200, 56, 300], [[], [], []]),
}
WINDOWS = [None, 1, 2, 100, 128, 129, 300, 5000]


def expected_mask(branches: Branches, window: int | None) -> BlockMask:
    """torch's own, from every pair of tokens."""
    length = mask_length(len(branches.positions))
    tokens = len(branches.positions)
    ends = torch.cat([branches.ends, torch.arange(tokens, length) + 1])
    row = Branches(branches.stems, ends, pad(branches.positions, (0, length - tokens)))
    return create_block_mask(lambda b, h, q, k: row.sees(q, k, window), None, None, length, length, device="cpu")


def assert_is_the_mask(branches: Branches, window: int | None) -> None:
    """The block mask is torch's own, block by block and in all that it shows."""
    actual, expected = block_mask(branches, window), expected_mask(branches, window)
    assert actual.BLOCK_SIZE == expected.BLOCK_SIZE == (MASK_BLOCK, MASK_BLOCK)
    assert actual.seq_lengths == expected.seq_lengths
    for kind in ("kv", "full_kv", "q", "full_q"):  # those of queries are for the backward pass
        for part in ("num_blocks", "indices"):
            one, other = getattr(actual, f"{kind}_{part}"), getattr(expected, f"{kind}_{part}")
            assert one.dtype == other.dtype
            assert torch.equal(one, other), f"{kind}_{part}"
    length = len(branches.positions)
    places = torch.arange(length)
    shown = visible_pairs(actual)
    assert torch.equal(shown[:length, :length], branches.sees(places[:, None], places, window))
    assert not shown[:length, length:].any()
    assert not shown[length:, :length].any()


def visible_pairs(mask: BlockMask) -> torch.Tensor:
    """(L, L): whole blocks, and of the others what the mask's function says."""
    length, size = mask.seq_lengths[0], MASK_BLOCK
    shown = torch.zeros(length, length, dtype=torch.bool)
    places = torch.arange(length)
    nothing = torch.zeros((), dtype=torch.long)
    function = mask.mask_mod(nothing, nothing, places[:, None], places[None])
    for row in range(length // size):
        queries = slice(row * size, (row + 1) * size)
        for kind in ("kv", "full_kv"):
            count = getattr(mask, f"{kind}_num_blocks")[0, 0, row]
            for column in getattr(mask, f"{kind}_indices")[0, 0, row, :count].tolist():
                keys = slice(column * size, (column + 1) * size)
                shown[queries, keys] = function[queries, keys] if kind == "kv" else True
    return shown


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ROWS)
def test_blocks_are_those_that_every_pair_of_tokens_gives(name: str, window: int | None) -> None:
    assert_is_the_mask(branches_of(*ROWS[name]), window)


lengths = st.one_of(st.integers(1, 40), st.integers(100, 300), st.sampled_from([127, 128, 129, 256, 384]))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(lengths, st.lists(lengths, max_size=4)), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 700), st.sampled_from([127, 128, 129, 256])),
)
def test_blocks_of_any_row_are_those_that_every_pair_of_tokens_gives(
    groups: list[tuple[int, list[int]]], window: int | None
) -> None:
    row = [prompt for prompt, _ in groups], [branches for _, branches in groups]
    assert_is_the_mask(branches_of(*row), window)


@pytest.mark.parametrize("window", [None, 4, 300])
@pytest.mark.parametrize("row", [([5, 3], [[4, 2], [7]]), ([300, 90], [[140, 32, 1], [64] * 4])])
def test_flex_attention_under_it_attends_as_the_dense_mask_says(row: Row, window: int | None) -> None:
    branches = branches_of(*row)
    query, key, value = (part.detach() for part in inputs(len(branches.positions), 2, torch.float32))
    padding = (0, 0, 0, mask_length(query.shape[2]) - query.shape[2])
    padded = [pad(part, padding) for part in (query, key, value)]
    actual: Any = flex_attention(*padded, block_mask=block_mask(branches, window), scale=SCALE, enable_gqa=True)
    assert actual.shape[1] == HEADS
    expected = dense(branches, [query, key, value], window)
    torch.testing.assert_close(actual[:, :, : query.shape[2]], expected, rtol=1e-5, atol=1e-5)


class Sizes(TorchDispatchMode):
    """Bytes of what is computed: the largest tensor, and all together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
                self.total += leaf.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize(("tokens", "largest"), [(32_768, 2**20), (131_072, 8 * 2**20)])
@pytest.mark.parametrize("window", [None, 4096])
def test_a_long_row_takes_a_mebibyte_not_a_gibibyte(tokens: int, largest: int, window: int | None) -> None:
    groups = tokens // 4096
    branches = branches_of([1024] * groups, [[768] * 4] * groups)
    assert len(branches.positions) == tokens
    with Sizes() as sizes:
        block_mask(branches, window)
    assert sizes.largest <= largest
    assert sizes.total <= 100 * largest, "even if nothing were freed on the way"


def test_few_lengths_are_compiled() -> None:
    lengths = {mask_length(length) for length in range(1, 20_000, 7)}
    assert lengths == {512, 1024, 2048, 4096, 8192, 16384, 32768}
    assert all(mask_length(length) >= length for length in range(1, 20_000, 7))
