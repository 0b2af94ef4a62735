"""Packs hold every completion once, within the budget, and say where each of its tokens is predicted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.algorithm.branches import branches_of
from grpo_cli.algorithm.losses import LossOutput, policy_loss
from grpo_cli.algorithm.packing import (
    Group,
    Pack,
    deal_groups,
    empty_pack,
    pack_groups,
    plan_minibatches,
)
from grpo_cli.algorithm.sampler_correction import sampler_ratio
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.loss_types import LOSS_TYPES
from grpo_cli.recipe.schema import LossConfig, SamplerCorrectionConfig
from grpo_cli.train.metrics import MetricMeans
from tests.conftest import tiny_llama

PROMPT_TOKENS, COMPLETION_TOKENS = st.integers(1, 49), st.integers(50, 99)


@st.composite
def ragged_groups(draw: st.DrawFn) -> list[Group]:
    """A few groups; empty completions and prompts of one token among them."""
    groups, start = [], 0
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(PROMPT_TOKENS, min_size=1, max_size=6))
        completions = draw(
            st.lists(st.lists(COMPLETION_TOKENS, min_size=0, max_size=6), min_size=1, max_size=5),
        )
        groups.append(Group(prompt, completions, range(start, start + len(completions))))
        start += len(completions)
    return groups


def completions_of(groups: list[Group]) -> dict[int, list[int]]:
    return {s: list(c) for group in groups for s, c in zip(group.samples, group.completions, strict=True)}


def prompt_of(groups: list[Group], sample: int) -> list[int]:
    return next(list(group.prompt) for group in groups if sample in group.samples)


def visible_tokens(pack: Pack) -> list[list[int]]:
    """For each completion token of a pack, in order, the tokens that its predictor attends to, by position."""
    contexts = []
    width = pack.input_ids.shape[1]
    for place in pack.predictors.tolist():
        row, column = divmod(place, width)
        tokens, positions = pack.input_ids[row], pack.position_ids[row]
        if pack.branches is None:
            assert pack.attention_mask is not None
            seen = torch.arange(column + 1)
            assert pack.attention_mask[row, seen].all()
        else:
            seen = pack.branches.sees(torch.tensor(column), torch.arange(width)).nonzero().squeeze(1)
        order = seen[positions[seen].argsort()]
        assert positions[order].tolist() == list(range(len(order))), "a position seen twice or not at all"
        contexts.append(tokens[order].tolist())
    return contexts


def input_tokens(pack: Pack, shared_prompt: bool) -> int:
    assert pack.input_ids.shape == pack.position_ids.shape
    if shared_prompt:
        assert pack.attention_mask is None
        assert pack.branches is not None
        assert pack.branches.stems[-1].end == len(pack.branches.positions) == pack.input_ids.shape[1]
    else:
        assert pack.attention_mask is not None
        assert pack.attention_mask.shape == pack.input_ids.shape
    return pack.input_ids.numel()


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 12))
def test_minibatches_cover_every_group_once_in_parts_as_equal_as_can_be(groups: int, steps: int) -> None:
    parts = plan_minibatches(groups, steps)
    assert len(parts) == steps
    assert [group for part in parts for group in part] == list(range(groups))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=150, deadline=None)
@given(ragged_groups(), st.integers(1, 60), st.booleans())
def test_every_completion_is_in_exactly_one_pack_with_its_own_tokens(
    groups: list[Group], budget: int, shared_prompt: bool
) -> None:
    packs = pack_groups(groups, budget, shared_prompt=shared_prompt)
    expected = completions_of(groups)
    seen = [sample for pack in packs for sample in pack.samples.tolist()]
    assert sorted(seen) == sorted(expected)
    for pack in packs:
        assert pack.mask.shape == pack.targets.shape == (len(pack.samples), pack.targets.shape[1])
        for sample, targets, mask in zip(pack.samples.tolist(), pack.targets, pack.mask, strict=True):
            assert targets[mask].tolist() == expected[sample]
            assert (targets[~mask] == 0).all()


@settings(max_examples=150, deadline=None)
@given(ragged_groups(), st.integers(1, 60), st.booleans())
def test_each_token_is_predicted_from_its_prompt_and_the_tokens_before_it(
    groups: list[Group], budget: int, shared_prompt: bool
) -> None:
    expected = completions_of(groups)
    for pack in pack_groups(groups, budget, shared_prompt=shared_prompt):
        contexts = iter(visible_tokens(pack))
        for sample in pack.samples.tolist():
            for place in range(len(expected[sample])):
                assert next(contexts) == [*prompt_of(groups, sample), *expected[sample][:place]]
        assert next(contexts, None) is None


@settings(max_examples=150, deadline=None)
@given(ragged_groups(), st.integers(1, 60), st.booleans())
def test_a_pack_over_the_budget_holds_a_single_completion(
    groups: list[Group], budget: int, shared_prompt: bool
) -> None:
    for pack in pack_groups(groups, budget, shared_prompt=shared_prompt):
        if input_tokens(pack, shared_prompt) > budget:
            assert len(pack.samples) == 1


@settings(max_examples=60, deadline=None)
@given(ragged_groups())
def test_a_wide_budget_makes_one_pack_that_feeds_each_prompt_once_and_no_last_token(groups: list[Group]) -> None:
    (pack,) = pack_groups(groups, 10_000)
    fed = sum(len(g.prompt) + sum(max(len(c) - 1, 0) for c in g.completions) for g in groups)
    assert pack.input_ids.shape == (1, fed)
    assert pack.samples.tolist() == list(completions_of(groups)), "shared-prompt packs keep the order"


def test_a_group_over_the_budget_is_split_and_each_part_has_the_prompt() -> None:
    group = Group([1, 2, 3], [[50, 51, 52], [53, 54, 55], [56, 57, 58]], [4, 5, 6])
    packs = pack_groups([group], 7)
    assert [pack.samples.tolist() for pack in packs] == [[4, 5], [6]]
    assert packs[0].input_ids.tolist() == [[1, 2, 3, 50, 51, 53, 54]]
    assert packs[0].position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4]]
    assert packs[0].predictors.tolist() == [2, 3, 4, 2, 5, 6]
    assert packs[1].input_ids.tolist() == [[1, 2, 3, 56, 57]]


def test_groups_share_a_pack_until_the_budget_is_full() -> None:
    groups = [Group([1, 2], [[50, 51]], [0]), Group([3], [[52], []], [1, 2]), Group([4, 5], [[53, 54]], [3])]
    packs = pack_groups(groups, 4)
    assert [pack.input_ids.tolist() for pack in packs] == [[[1, 2, 50, 3]], [[4, 5, 53]]]
    assert packs[0].branches is not None
    assert not packs[0].branches.sees(torch.tensor(3), torch.arange(3)).any(), "a group sees no other group"


def test_rows_of_like_length_share_a_pack() -> None:
    long = Group([1] * 6, [[50, 51]], [0])
    short = Group([2], [[52, 53]], [1])
    packs = pack_groups([short, long, Group([3], [[54, 55]], [2])], 8, shared_prompt=False)
    assert [sorted(pack.samples.tolist()) for pack in packs] == [[0], [1, 2]]
    assert [pack.input_ids.numel() for pack in packs] == [7, 4]


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_a_pack_of_empty_completions_predicts_nothing(shared_prompt: bool) -> None:
    (pack,) = pack_groups([Group([7], [[], []], [0, 1])], 10, shared_prompt=shared_prompt)
    assert pack.mask.shape == (2, 0)
    assert pack.predictors.numel() == 0
    assert pack.input_ids.numel() >= 1


def test_no_groups_make_no_packs() -> None:
    assert pack_groups([], 10) == []


def test_a_pack_moves_to_a_device_but_for_what_indexes_tensors_on_the_host() -> None:
    (pack,) = pack_groups([Group([7], [[50]], [0])], 10)
    moved = pack.to(torch.device("meta"))
    parts = vars(moved) | vars(moved.branches)
    tensors = {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}
    assert tensors.pop("samples").device.type == "cpu"
    assert len(tensors) == 8 + 2
    assert all(tensor.device.type == "meta" for tensor in tensors.values())


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_a_pack_knows_the_places_that_would_have_to_be_looked_for(shared_prompt: bool) -> None:
    groups = [Group([1, 2], [[3, 4, 5], [], [6]], [0, 1, 2]), Group([7], [[8, 9], [1]], [3, 4])]
    (pack,) = pack_groups(groups, 100, shared_prompt=shared_prompt)
    assert torch.equal(pack.targets.flatten()[pack.places], pack.targets[pack.mask])
    columns = pack.predictors % pack.input_ids.shape[1]
    assert torch.equal(pack.columns[pack.column_places], columns)
    assert torch.equal(pack.columns, columns.unique())


def test_a_window_hides_what_lies_further_back_in_the_sequence() -> None:
    branches = branches_of([3], [[2, 0, 2]])
    places = torch.arange(7)
    assert branches.stems[0].branch_lengths == (2, 2)
    assert branches.positions.tolist() == [0, 1, 2, 3, 4, 3, 4]
    seen = [row.nonzero().squeeze(1).tolist() for row in branches.sees(places[:, None], places, window=3)]
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [1, 2, 5], [2, 5, 6]]


# Several ranks


def fed_tokens(group: Group) -> int:
    return len(group.prompt) + sum(max(len(completion) - 1, 0) for completion in group.completions)


def groups_of(costs: list[int]) -> list[Group]:
    """Groups of these numbers of tokens, in prompts and completions of varying length."""
    parts = [(cost - cost // 2, cost // 2) for cost in costs]
    return [Group([1] * prompt, [[50] * (rest + 1)], [i]) for i, (prompt, rest) in enumerate(parts)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=6), st.integers(1, 3))
def test_each_group_is_dealt_once_in_order_and_the_largest_hand_is_within_graham_s_bound(
    costs: list[int], num_hands: int
) -> None:
    groups = groups_of(costs)
    assert [fed_tokens(group) for group in groups] == costs
    hands = deal_groups(groups, num_hands)
    assert len(hands) == num_hands
    dealt = [[groups.index(group) for group in hand] for hand in hands]
    assert sorted(itertools.chain(*dealt)) == list(range(len(groups)))
    assert all(indices == sorted(indices) for indices in dealt)
    best = min(
        max(sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == h) for h in range(num_hands))
        for owners in itertools.product(range(num_hands), repeat=len(costs))
    )
    largest = max(sum(map(fed_tokens, hand)) for hand in hands)
    assert 3 * num_hands * largest <= (4 * num_hands - 1) * best


@settings(max_examples=60, deadline=None)
@given(ragged_groups(), st.integers(1, 6))
def test_groups_are_dealt_whole_and_alike_on_every_rank(groups: list[Group], num_hands: int) -> None:
    hands = deal_groups(groups, num_hands)
    assert {id(group) for hand in hands for group in hand} == {id(group) for group in groups}
    assert deal_groups(list(groups), num_hands) == hands
    assert sum(not hand for hand in hands) == max(0, num_hands - len(groups))


def test_one_rank_gets_all_groups_and_no_groups_make_empty_hands() -> None:
    groups = groups_of([3, 9, 1, 9])
    assert deal_groups(groups, 1) == [groups]
    assert deal_groups([], 3) == [[], [], []]


def test_the_longest_groups_are_dealt_first() -> None:
    groups = groups_of([1, 1, 2, 4])
    assert deal_groups(groups, 2) == [[groups[3]], groups[:3]]


@pytest.mark.parametrize("shared_prompt", [True, False])
@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_an_empty_pack_is_forwarded_and_changes_nothing(shared_prompt: bool, entropy_gradient: bool) -> None:
    policy = PackedModel.checked(tiny_llama())
    assert policy.shares_prompts
    pack = empty_pack(shared_prompt=shared_prompt)
    assert input_tokens(pack, shared_prompt) == 1
    logprobs, entropies = policy.token_logprobs(pack, 0.7, entropy_gradient=entropy_gradient)
    assert logprobs.shape == entropies.shape == pack.mask.shape
    output = loss_of(pack, logprobs, entropies, LossConfig(beta=0.1, entropy_coef=0.5))
    assert output.loss.item() == 0
    output.loss.backward()
    for name, parameter in policy.model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def loss_of(pack: Pack, logprobs: torch.Tensor, entropies: torch.Tensor, config: LossConfig) -> LossOutput:
    old, sampled = logprobs.detach() - 0.1, logprobs.detach() - 0.2
    mask = pack.mask.float()
    corrected = config.importance_level == "token"
    return policy_loss(
        logprobs,
        old,
        torch.ones(len(pack.samples)),
        mask,
        config,
        normalizer=7.0,
        ref_logprobs=old,
        entropies=entropies,
        sampling_logprobs=sampled,
        importance_ratio=sampler_ratio(old, sampled, mask, SamplerCorrectionConfig()) if corrected else None,
        entropy_threshold=0.0,
    )


@pytest.mark.parametrize("shared_prompt", [True, False])
@pytest.mark.parametrize(
    "loss", [{"type": name} for name in LOSS_TYPES] + [{"importance_level": "sequence"}], ids=str
)
def test_an_empty_pack_counts_in_no_metric(loss: dict[str, Any], shared_prompt: bool) -> None:
    policy = PackedModel.checked(tiny_llama())
    config = LossConfig.model_validate(loss | {"beta": 0.1, "entropy_coef": 0.5, "off_policy_threshold": 0.2})
    (real,) = pack_groups([Group([5, 6], [[7, 8], [9]], [0, 1])], 100, shared_prompt=shared_prompt)
    empty = empty_pack(shared_prompt=shared_prompt)
    with torch.no_grad():
        outputs = [loss_of(pack, *policy.token_logprobs(pack, 1.0), config) for pack in (real, empty)]
    assert outputs[1].loss == 0
    one, both = MetricMeans(), MetricMeans()
    one.add(outputs[0])
    for output in outputs:
        both.add(output)
    assert one.result(Ranks()) == both.result(Ranks())
