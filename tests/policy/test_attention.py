"""Attention over a shared-prompt row equals dense attention under the row's mask, gradients included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from grpo_cli.algorithm.packing import Branches, branches_of
from grpo_cli.policy import attention
from grpo_cli.policy.attention import LayerInputs, RowLayout, block_mask, bucket, shared_prompt_attention

HEADS, HEAD_DIM, SCALE = 6, 8, 0.3

ROWS: dict[str, tuple[list[int], list[list[int]]]] = {
    "equal branches": ([5], [[4, 4, 4]]),
    "ragged branches": ([3, 1], [[1, 6, 3], [2, 5]]),
    "a prompt alone": ([4], [[]]),
    "prompts alone": ([4, 1, 7], [[], [], []]),
    "some without branches": ([2, 6, 1], [[], [3], []]),
}


def inputs(length: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key and value, laid out in memory as a model's projections leave them."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, length, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes
    ]


def dense(branches: Branches, parts: list[torch.Tensor], window: int | None) -> torch.Tensor:
    query, key, value = parts
    places = torch.arange(query.shape[2])
    mask = branches.sees(places[:, None], places, window)
    groups = HEADS // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)


def assert_equals_dense(branches: Branches, kv_heads: int, window: int | None) -> None:
    parts = inputs(len(branches.positions), kv_heads)
    actual = RowLayout(branches).attend(LayerInputs(0, *parts, SCALE, window))
    expected = dense(branches, parts, window)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = zip(torch.autograd.grad(actual, parts, grad), torch.autograd.grad(expected, parts, grad), strict=True)
    for actual_grad, expected_grad in pairs:
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("row", ROWS)
def test_a_row_attends_as_its_dense_mask_says(row: str, kv_heads: int, window: int | None) -> None:
    assert_equals_dense(branches_of(*ROWS[row]), kv_heads, window)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5)),
        min_size=1,
        max_size=3,
    ),
    st.one_of(st.none(), st.integers(1, 60)),
)
def test_rows_of_any_shape_attend_as_their_dense_mask_says(
    groups: list[tuple[int, list[int]]], window: int | None
) -> None:
    prompts, branches = [list(part) for part in zip(*groups, strict=True)]
    assert_equals_dense(branches_of(prompts, branches), 2, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close(dtype: torch.dtype) -> None:
    branches = branches_of([70], [[33, 20, 1]])
    parts = inputs(len(branches.positions), 2)
    expected = dense(branches, parts, None)
    actual = RowLayout(branches).attend(LayerInputs(0, *(part.to(dtype) for part in parts), SCALE, None))
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 4])
def test_the_block_mask_of_flex_attention_says_the_same(window: int | None) -> None:
    branches = branches_of([5, 3], [[4, 2], [7]])
    query, key, value = (part.detach() for part in inputs(len(branches.positions), 2, torch.float32))
    padding = (0, 0, 0, bucket(query.shape[2]) - query.shape[2])
    padded = [torch.nn.functional.pad(part, padding) for part in (query, key, value)]
    mask = block_mask(branches, window)
    actual: Any = flex_attention(*padded, block_mask=mask, scale=SCALE, enable_gqa=True)
    expected = dense(branches, [query, key, value], window)
    torch.testing.assert_close(actual[:, :, : query.shape[2]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 70])
def test_flex_attention_on_a_gpu_attends_as_the_dense_mask_says(window: int | None) -> None:
    branches = branches_of([300, 90], [[40, 32, 1], [64] * 4])
    parts = inputs(len(branches.positions), 2, torch.float32)
    on_gpu = [part.detach().cuda().requires_grad_() for part in parts]
    actual = RowLayout(branches.to(torch.device("cuda"))).attend(LayerInputs(0, *on_gpu, SCALE, window))
    expected = dense(branches, parts, window)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-2, atol=1e-2)
    grads = torch.autograd.grad(actual.square().sum(), on_gpu)
    for grad, part in zip(grads, torch.autograd.grad(expected.square().sum(), parts), strict=True):
        torch.testing.assert_close(grad.cpu(), part, rtol=2e-2, atol=2e-2)


def test_few_lengths_are_compiled() -> None:
    buckets = {bucket(length) for length in range(1, 20_000, 7)}
    assert buckets == {512, 1024, 2048, 4096, 8192, 16384, 32768}
    assert all(bucket(length) >= length for length in range(1, 20_000, 7))


@pytest.mark.parametrize("arguments", [{"softcap": 30.0}, {"s_aux": torch.ones(6)}, {"dropout": 0.1}])
def test_what_the_kernel_does_not_compute_is_refused(arguments: dict[str, Any]) -> None:
    branches = branches_of([3], [[2]])
    layout = {attention.LAYOUT: RowLayout(branches)}
    with pytest.raises(ValueError, match="shared-prompt attention has no"):
        shared_prompt_attention(SimpleNamespace(layer_idx=0), *inputs(5, 2), None, **arguments, **layout)


def test_values_of_another_size_than_keys_are_refused() -> None:
    query, key, value = inputs(5, 2)
    layout = {attention.LAYOUT: RowLayout(branches_of([3], [[2]]))}
    with pytest.raises(ValueError, match="one size"):
        shared_prompt_attention(SimpleNamespace(layer_idx=0), query, key, value[..., :4], None, **layout)


def test_without_a_layout_the_kernel_is_plain_sdpa() -> None:
    query, key, value = inputs(5, 6)
    module = SimpleNamespace(is_causal=True)
    actual, _ = shared_prompt_attention(module, query, key, value, None, scaling=SCALE)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE)
    torch.testing.assert_close(actual, expected.transpose(1, 2))
