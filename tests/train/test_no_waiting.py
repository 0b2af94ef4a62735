"""Between packs nobody asks a device for a number: it would have nothing to do until the host had heard it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from grpo_cli.algorithm.branches import branches_of
from grpo_cli.algorithm.losses import MeasuredLoss, measured_loss, policy_loss
from grpo_cli.algorithm.packing import Group, Pack, pack_groups
from grpo_cli.algorithm.sampler_correction import sampler_ratio
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.policy.block_mask import block_mask
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.self_check import DenseLayout
from grpo_cli.recipe.schema import LossConfig, SamplerCorrectionConfig
from grpo_cli.train.metrics import MetricMeans
from grpo_cli.train.step_data import OldLogprobs, PackData, share
from tests.conftest import tiny_llama

WAITING = {
    "_local_scalar_dense",  # .item(), float(), bool(), and every `if` about a tensor
    "allclose",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
"""Operations whose result, or the size of it, the host must be told."""

LOSSES: dict[str, dict[str, Any]] = {
    "default": {},
    "kl and entropy": {"beta": 0.1, "entropy_coef": 0.01, "top_entropy_quantile": 0.3},
    "sequence": {"importance_level": "sequence", "off_policy_threshold": 0.1},
    "vespo": {"type": "vespo"},
    "cispo": {"type": "cispo"},
    "sapo": {"type": "sapo"},
    "corrected": {"sampler_correction": SamplerCorrectionConfig(mode="token_mask")},
}


class NoWaiting(TorchDispatchMode):
    """Fails where a host would wait for a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        chosen_by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in tree_leaves(args[1])
        )
        if name in WAITING or chosen_by_mask:
            raise AssertionError(f"the host waits for {function}")
        return function(*args, **(kwargs or {}))


def groups() -> list[Group]:
    return [Group([5, 6, 7], [[8, 9, 3, 1], [4], []], [0, 1, 2]), Group([2], [[8, 5], [6, 6, 6]], [3, 4])]


def loss_of(policy: PackedModel, pack: Pack, config: LossConfig) -> MeasuredLoss:
    """The loss as the loop computes it."""
    layout = None if pack.branches is None else DenseLayout(pack.branches)  # the CPU's own kernel is no device's
    logprobs, entropies = policy.token_logprobs(pack, 0.7, entropy_gradient=config.entropy_coef > 0, layout=layout)
    old, mask = logprobs.detach() - 0.1, pack.mask.float()
    correction = config.sampler_correction
    return measured_loss(
        logprobs,
        old,
        torch.linspace(-1, 1, len(pack.samples)),
        mask,
        config,
        normalizer=7.0,
        ref_logprobs=old + 0.3,
        sampling_logprobs=old - 0.2,
        importance_ratio=None if correction is None else sampler_ratio(old, old - 0.2, mask, correction),
        entropies=entropies,
    )


@pytest.mark.parametrize("has_plain_head", [True, False])
@pytest.mark.parametrize("shared_prompt", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_a_pack_goes_forward_and_backward_without_a_word_to_the_host(
    monkeypatch: pytest.MonkeyPatch, name: str, shared_prompt: bool, has_plain_head: bool
) -> None:
    # With padded rows transformers itself asks, once in each pass, whether anything is padded.
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)
    policy, config = PackedModel.checked(tiny_llama()), LossConfig(**LOSSES[name])
    assert policy.logit_form is not None
    if not has_plain_head:
        policy.logit_form = None
    (pack,) = pack_groups(groups(), 100, shared_prompt=shared_prompt)
    means = MetricMeans()
    with NoWaiting():
        output = loss_of(policy, pack, config)
        output.loss.backward()
        means.add(output)
    metrics, _ = output.measured.summary()
    assert means.result(Ranks()) == metrics


def test_the_block_mask_is_built_without_a_word_to_the_host() -> None:
    branches = branches_of([5, 700], [[4, 2], [300]])
    with NoWaiting():
        block_mask(branches, 200)


def test_the_counting_sees_what_the_loop_once_did() -> None:
    row = torch.ones(3)
    mask = row > 0
    for waits in (lambda: row[mask], lambda: row.sum().item(), row.unique, lambda: bool(mask.any())):
        with NoWaiting(), pytest.raises(AssertionError, match="the host waits"):
            waits()


def test_metrics_read_at_the_end_are_those_of_the_public_loss() -> None:
    """Same numbers, later."""
    policy, config = PackedModel.checked(tiny_llama()), LossConfig(beta=0.1)
    (pack,) = pack_groups(groups(), 100)
    logprobs, entropies = policy.token_logprobs(pack, 0.7)
    arguments: dict[str, Any] = {"normalizer": 7.0, "ref_logprobs": logprobs.detach(), "entropies": entropies}
    inputs = logprobs, logprobs.detach() - 0.5, torch.ones(5), pack.mask, config
    public, later = policy_loss(*inputs, **arguments), measured_loss(*inputs, **arguments)
    assert (public.metrics, public.weights) == later.measured.summary()
    assert public.loss == later.loss
    assert all(isinstance(value, float) for value in public.metrics.values())


def test_a_loss_that_is_kept_for_its_metrics_keeps_no_graph() -> None:
    means, weight = MetricMeans(), torch.ones(2, 3, requires_grad=True)
    logprobs = weight * 2
    means.add(
        measured_loss(
            logprobs,
            logprobs.detach(),
            torch.ones(2),
            torch.ones(2, 3),
            LossConfig(beta=0.1),
            normalizer=1.0,
            ref_logprobs=logprobs.detach(),
            entropies=logprobs,
        )
    )
    (summary,) = means._unread
    kept = tree_leaves([summary.__self__.indicators, summary.__self__.mask, summary.__self__.sampler])  # type: ignore[attr-defined]
    assert not any(tensor.requires_grad for tensor in kept if isinstance(tensor, torch.Tensor))


def test_old_logprobs_of_later_iterations_stay_on_the_device() -> None:
    (pack,) = pack_groups(groups(), 100)
    scored = torch.zeros(5, 4)
    old = OldLogprobs(scored, torch.zeros(5).bool())
    old.keep(pack, pack.mask.float())
    first = old.of(pack)
    old.keep(pack, torch.zeros_like(first))
    assert old.of(pack) is first
    assert not scored.any(), "nothing came to the host"


def test_old_logprobs_that_were_scored_are_not_replaced() -> None:
    (pack,) = pack_groups(groups(), 100)
    old = OldLogprobs(torch.full((5, 4), -2.0), torch.ones(5).bool())
    old.keep(pack, pack.mask.float())
    assert (old.of(pack) == -2).all()


@contextmanager
def device_that_tells_on_us() -> Iterator[None]:
    """CUDA raises wherever the host would wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LOSSES)
def test_cuda_itself_sees_no_wait_between_two_packs(name: str) -> None:
    device, config = torch.device("cuda"), LossConfig(**LOSSES[name])
    policy = PackedModel.checked(tiny_llama().to(device))
    assert policy.why_not_shared is None
    packs = pack_groups(groups(), 8)
    assert len(packs) == 2
    for pack in packs:  # compiles
        loss_of_step(policy, pack.to(device), config).loss.backward()
    torch.cuda.synchronize()
    means = MetricMeans()
    with device_that_tells_on_us():
        for pack in packs:
            output = loss_of_step(policy, pack.to(device), config)
            output.loss.backward()
            means.add(output)
    assert means.result(Ranks())


def loss_of_step(policy: PackedModel, pack: Pack, config: LossConfig) -> MeasuredLoss:
    """With what stands on the host for the whole step."""
    values = torch.full((5, 4), -1.0)
    old = OldLogprobs(values, torch.zeros(5).bool())
    own = PackData(*(share(tensor, pack) for tensor in (torch.linspace(-1, 1, 5), values.abs(), values, values)))
    logprobs, entropies = policy.token_logprobs(pack, 0.7, entropy_gradient=config.entropy_coef > 0)
    old.keep(pack, logprobs)
    correction = config.sampler_correction
    return measured_loss(
        logprobs,
        old.of(pack),
        own.advantages,
        own.mask,
        config,
        normalizer=7.0,
        ref_logprobs=own.ref_logprobs,
        sampling_logprobs=own.sampling_logprobs,
        importance_ratio=(
            None
            if correction is None
            else sampler_ratio(old.of(pack), own.sampling_logprobs, own.mask, correction)
        ),
        entropies=entropies,
    )
