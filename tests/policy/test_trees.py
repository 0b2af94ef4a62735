"""A tree of turns gives what plain rows give, in both kernels; and a plain group gives the same bytes as ever."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from grpo_cli.algorithm.branches import branches_of
from grpo_cli.algorithm.packing import pack_groups
from grpo_cli.policy import attention
from grpo_cli.policy.attention import LayerInputs, RowLayout
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.limits import mask_length
from grpo_cli.recipe.schema import LossConfig
from tests.algorithm.test_packing import loss_of
from tests.policy.test_attention import SCALE, assert_equals_dense, dense, inputs
from tests.policy.test_block_mask import assert_is_the_mask, visible_pairs
from tests.policy.test_logprobs import SHARING, assert_same, build, one_by_one, outputs
from tests.trees import depth_of, tree_groups, tree_row

FLEX_CPU = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(params=["cpu", "flex"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either kernel. A GPU's is a dense one under its block mask here, as it has no backward pass on a CPU."""
    if request.param == "flex":
        monkeypatch.setattr(attention, "compiled_flex_attention", by_block_mask)
        monkeypatch.setattr(RowLayout, "attend", attend_as_on_a_gpu)
    return str(request.param)


def attend_as_on_a_gpu(layout: RowLayout, inputs: LayerInputs) -> torch.Tensor:
    layout.note_window(inputs)
    return layout._flex(inputs)


def by_block_mask(*parts: torch.Tensor, block_mask: BlockMask, **options: Any) -> torch.Tensor:
    """What FlexAttention computes, from the blocks that it would visit."""
    return scaled_dot_product_attention(*parts, attn_mask=visible_pairs(block_mask), **options)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.one_of(st.none(), st.integers(1, 40)))
def test_a_tree_attends_as_its_dense_mask_says(seed: int, longest: int, window: int | None) -> None:
    assert_equals_dense(tree_row(seed, longest=longest), 2, window)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tree_in_lower_precision_stays_close(dtype: torch.dtype, window: int | None) -> None:
    branches = tree_row(4, longest=30)
    parts = inputs(len(branches.positions), 2)
    expected = dense(branches, parts, window)
    actual = RowLayout(branches).attend(LayerInputs(0, *(part.to(dtype) for part in parts), SCALE, window))
    assert actual.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 70])
def test_flex_attention_of_a_tree_on_a_gpu_attends_as_the_dense_mask_says(window: int | None) -> None:
    branches = tree_row(1, longest=90)
    parts = inputs(len(branches.positions), 2, torch.float32)
    on_gpu = [part.detach().cuda().requires_grad_() for part in parts]
    actual = RowLayout(branches.to(torch.device("cuda"))).attend(LayerInputs(0, *on_gpu, SCALE, window))
    expected = dense(branches, parts, window)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-2, atol=1e-2)
    grads = torch.autograd.grad(actual.square().sum(), on_gpu)
    for grad, part in zip(grads, torch.autograd.grad(expected.square().sum(), parts), strict=True):
        torch.testing.assert_close(grad.cpu(), part, rtol=2e-2, atol=2e-2)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([5, 40, 120]),
    st.one_of(st.none(), st.integers(1, 700), st.sampled_from([1, 2, 127, 128, 129, 256])),
)
def test_blocks_of_a_tree_are_those_that_every_pair_of_tokens_gives(
    seed: int, longest: int, window: int | None
) -> None:
    assert_is_the_mask(tree_row(seed, longest=longest), window)


@FLEX_CPU
@pytest.mark.parametrize("window", [None, 6, 90])
@pytest.mark.parametrize(("seed", "longest"), [(0, 6), (1, 60)])
def test_flex_attention_of_a_tree_is_dense_attention(
    monkeypatch: pytest.MonkeyPatch, seed: int, longest: int, window: int | None
) -> None:
    monkeypatch.setattr(attention, "compiled_flex_attention", flex_attention)
    branches = tree_row(seed, longest=longest)
    parts = [part.detach() for part in inputs(len(branches.positions), 2, torch.float32)]
    actual = RowLayout(branches)._flex(LayerInputs(0, *parts, SCALE, window))
    torch.testing.assert_close(actual, dense(branches, parts, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "mistral with a sliding window", "gemma3 with a window of its own in most layers"],
)
def test_log_probabilities_entropies_and_gradients_of_a_tree_are_those_of_plain_rows(
    kernel: str, name: str, seed: int
) -> None:
    groups = tree_groups(seed, rooted=seed > 0)
    model = build(SHARING[name]())
    expected = one_by_one(model, groups, entropy_gradient=True)
    policy = PackedModel.checked(model)
    assert policy.why_not_shared is None
    (pack,) = pack_groups(groups, 10_000)
    assert pack.branches is not None
    assert depth_of(pack.branches) >= 4
    for shared_prompt, budget in ((True, 25), (True, 10_000), (False, 100)):
        actual = outputs(policy, groups, budget, shared_prompt=shared_prompt, entropy_gradient=True)
        assert_same(actual, expected)


@pytest.mark.parametrize("name", ["qwen2", "mistral with a sliding window"])
def test_the_loss_of_a_tree_is_that_of_plain_rows_gradients_included(kernel: str, name: str) -> None:
    groups = tree_groups(7)
    policy = PackedModel.checked(build(SHARING[name]()))
    config = LossConfig(beta=0.1, entropy_coef=0.1)
    found = []
    for shared_prompt, budget in ((False, 10_000), (True, 10_000), (True, 40)):
        policy.model.zero_grad()
        total = torch.zeros(())
        for pack in pack_groups(groups, budget, shared_prompt=shared_prompt):
            loss = loss_of(pack, *policy.token_logprobs(pack, 1.0, entropy_gradient=True), config).loss
            loss.backward()
            total += loss.detach()
        found.append((total, [parameter.grad.clone() for parameter in policy.model.parameters()]))
    (expected, expected_grads), *others = found
    for total, grads in others:
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            floor = 1e-5 * max(expected_grad.abs().max().item(), 1e-2)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=floor)


def test_gradient_checkpointing_of_a_tree_changes_nothing() -> None:
    groups = tree_groups(2)
    model = build(SHARING["llama"]())
    expected = one_by_one(model, groups)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(outputs(PackedModel.checked(model), groups, 1000, shared_prompt=True), expected)


def test_a_kernel_that_forgets_the_inner_stems_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check's row is a tree, not only prompts and branches."""
    right = RowLayout.attend

    def flat(layout: RowLayout, inputs: LayerInputs) -> torch.Tensor:
        attended = right(layout, inputs)
        for stem in layout.branches.stems:
            if stem.position > 0:
                attended = attended.clone()
                attended[:, :, stem.start :] *= 1.5
        return attended

    monkeypatch.setattr(RowLayout, "attend", flat)
    assert "is off by" in str(PackedModel.checked(build(SHARING["llama"]())).why_not_shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branches", [(6, 6, 6), (9, 1, 4)])
def test_a_plain_group_is_attended_to_in_the_same_operations_as_ever(
    branches: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Bit for bit what the kernel gave when it knew prompts and completions alone, gradients included."""
    row = branches_of([11], [branches])
    parts = [part.detach().to(dtype).requires_grad_() for part in inputs(len(row.positions), 2)]
    actual = RowLayout(row).attend(LayerInputs(0, *parts, SCALE, None))
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    grads = torch.autograd.grad(actual, parts, grad)
    expected, *expected_grads = two_levels([part.detach() for part in parts], grad, 11, branches)
    assert torch.equal(actual, expected)
    for one, other in zip(grads, expected_grads, strict=True):
        assert torch.equal(one, other)


def two_levels(
    parts: list[torch.Tensor], grad: torch.Tensor, prompt: int, branches: tuple[int, ...]
) -> list[torch.Tensor]:
    """Output and gradients of one prompt with its branches."""
    forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    shape = attention._Padding(branches)
    heads = [part[:, :, :prompt] for part in parts]
    tails = [part[:, :, prompt:] for part in parts]
    out, lse = forward(*heads, 0.0, True, scale=SCALE)
    out_prompt, lse_prompt = forward(tails[0], *heads[1:], 0.0, False, scale=SCALE)
    out_own, lse_own = map(shape.unpad, forward(*map(shape.pad, tails), 0.0, True, scale=SCALE))
    merged = torch.logaddexp(lse_prompt, lse_own)
    out_prompt *= (lse_prompt - merged).exp_()[..., None]
    out_own *= (lse_own - merged).exp_()[..., None]
    out_tail = torch.add(out_prompt, out_own)
    whole = torch.cat([out, out_tail], 2)
    head, tail = grad[:, :, :prompt], grad[:, :, prompt:]
    of_prompt = backward(head, *heads, out, lse, 0.0, True, scale=SCALE)
    of_shared = backward(tail, tails[0], *heads[1:], out_tail, merged, 0.0, False, scale=SCALE)
    padded = [shape.pad(part) for part in (tail, *tails, out_tail)]
    of_own = backward(*padded, shape.pad(merged, math.inf), 0.0, True, scale=SCALE)
    own_query, own_key, own_value = map(shape.unpad, of_own)
    return [
        whole,
        torch.cat([of_prompt[0], of_shared[0] + own_query], 2),
        torch.cat([of_prompt[1] + of_shared[1], own_key], 2),
        torch.cat([of_prompt[2] + of_shared[2], own_value], 2),
    ]


def test_blocks_of_padding_are_computed_on_the_diagonal_alone() -> None:
    branches = branches_of([600], [[]])
    mask = attention.block_mask(branches, None)
    blocks = mask.kv_num_blocks + mask.full_kv_num_blocks
    assert mask_length(600) == 1024
    assert blocks.flatten().tolist() == [1, 2, 3, 4, 5, 1, 1, 1]


def test_a_tree_is_fed_fewer_tokens_than_its_rows() -> None:
    (group, _) = tree_groups(3, longest=20)
    (tree,) = pack_groups([group], 10**6)
    rows = pack_groups([group], 1, shared_prompt=False)
    assert tree.input_ids.numel() < 0.6 * sum(pack.input_ids.numel() for pack in rows)
