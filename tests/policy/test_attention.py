"""Attention over a shared-prompt row equals dense attention under the row's mask, gradients included."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from grpo_cli.algorithm.branches import Branches, branches_of
from grpo_cli.errors import RunError
from grpo_cli.policy import attention
from grpo_cli.policy.attention import (
    LayerInputs,
    RowLayout,
    compiled_flex_attention,
    shared_prompt_attention,
)

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


@pytest.mark.parametrize("window", [None, 40, 41])
def test_a_lone_prompt_needs_no_mask(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """What a GPU does with it: plain causal attention, nothing to build and nothing to compile."""
    monkeypatch.delattr(attention, "block_mask")
    branches = branches_of([40], [[]])
    parts = inputs(40, 2, torch.float32)
    actual = RowLayout(branches)._flex(LayerInputs(0, *parts, SCALE, window))
    torch.testing.assert_close(actual, dense(branches, parts, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "window"), [(([40], [[]]), 39), (([40, 1], [[], []]), None), (([40], [[1]]), None)]
)
def test_other_rows_are_masked_once_for_all_their_layers(
    monkeypatch: pytest.MonkeyPatch, row: tuple[list[int], list[list[int]]], window: int | None
) -> None:
    built = []
    monkeypatch.setattr(attention, "block_mask", lambda *arguments: built.append(arguments))
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda query, key, value, **_: query)
    layout = RowLayout(branches_of(*row))
    for layer in range(3):
        layout._flex(LayerInputs(layer, *inputs(len(layout.branches.positions), 2), SCALE, window))
    assert built == [(layout.branches, window)]


def shapes_in_a_second_thread(count: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What FlexAttention gives, or raises, for rows of `count` lengths in a thread that has set nothing."""
    compiled = torch.compile(lambda row: row.cos(), backend="eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(attention, "_compiled", lambda: compiled)

    def attend(length: int) -> Any:
        try:
            return compiled_flex_attention(torch.zeros(length)).sum().item()
        except RunError as error:
            return error

    torch._dynamo.reset()
    with ThreadPoolExecutor(1) as pool:
        return list(pool.map(attend, range(2, 2 + count)))


def test_a_second_thread_may_compile_as_many_shapes_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps its limit of 8 for each thread, and past it computes whole score matrices."""
    assert shapes_in_a_second_thread(20, monkeypatch) == list(range(2, 22))
    assert torch._dynamo.config.recompile_limit < attention.COMPILED_VARIANTS, (
        "what others compile has torch's limit"
    )


def test_one_shape_too_many_is_told_rather_than_computed_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "COMPILED_VARIANTS", 5)
    found = shapes_in_a_second_thread(6, monkeypatch)
    assert found[:5] == [2, 3, 4, 5, 6]
    assert "FlexAttention has been compiled 5 times" in str(found[5])


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
