"""Weights by hand, their bounds whatever goes in, and metrics that do not depend on how a step is split."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.algorithm.losses import loss_normalizer, policy_loss
from grpo_cli.algorithm.sampler_correction import LOG_RATIO_LIMIT, sampler_metrics, sampler_ratio
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.recipe.schema import LossConfig, SamplerCorrectionConfig
from grpo_cli.train.metrics import MetricMeans

NAN, INF = math.nan, math.inf
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
DIFFERENCE = "sampling/sampling_logp_difference"
RATIO = "sampling/importance_sampling_ratio"

# Policy over sampler is 2, 1/4 and 4 in the first completion, 1/2, unknown and padding in the second.
OLD = torch.tensor([[0.4, 0.1, 0.8], [0.3, 0.5, 0.9]]).log()
SAMPLED = torch.tensor([[0.2, 0.4, 0.2], [0.6, NAN, 0.1]]).log()
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def correction(mode: str, low: float | None, high: float | None) -> SamplerCorrectionConfig:
    return SamplerCorrectionConfig(mode=mode, clip_min=low, clip_max=high)  # type: ignore[arg-type]


def ratio_of(old: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor, *config: Any) -> torch.Tensor:
    return sampler_ratio(old, sampled, mask, correction(*config))


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, 3.0, [[2.0, 0.25, 3.0], [0.5, 1.0, 1.0]]),
        ("token_truncate", 0.3, None, [[2.0, 0.3, 4.0], [0.5, 1.0, 1.0]]),
        ("token_truncate", None, 0.8, [[0.8, 0.25, 0.8], [0.5, 1.0, 1.0]]),
        ("token_mask", None, 3.0, [[2.0, 0.25, 0.0], [0.5, 1.0, 1.0]]),
        ("token_mask", 0.6, 5.0, [[2.0, 0.0, 4.0], [0.0, 1.0, 1.0]]),
        ("sequence_truncate", None, 3.0, [[2.0], [0.5]]),
        ("sequence_truncate", 0.7, 1.5, [[1.5], [0.7]]),
        ("sequence_mask", None, 1.5, [[0.0], [0.5]]),
        ("sequence_mask", 0.7, None, [[2.0], [0.0]]),
    ],
)
def test_weights_are_those_computed_by_hand(
    mode: str, low: float | None, high: float | None, expected: list[list[float]]
) -> None:
    torch.testing.assert_close(ratio_of(OLD, SAMPLED, MASK, mode, low, high), torch.tensor(expected))


def test_metrics_are_those_computed_by_hand() -> None:
    metrics, weights = sampler_metrics(
        OLD, SAMPLED, MASK, ratio_of(OLD, SAMPLED, MASK, "token_truncate", None, 3.0)
    )
    assert metrics == pytest.approx(
        {
            f"{DIFFERENCE}/mean": math.log(2 * 4 * 4 * 2) / 4,
            f"{DIFFERENCE}/max": math.log(4),
            f"{RATIO}/min": 0.25,
            f"{RATIO}/mean": (2 + 0.25 + 3 + 0.5 + 1) / 5,
            f"{RATIO}/max": 3.0,
        }
    )
    assert weights == {f"{DIFFERENCE}/mean": 4.0, f"{RATIO}/mean": 5.0}


def test_sequence_metrics_leave_out_completions_that_are_masked_whole() -> None:
    mask = MASK * torch.tensor([[1.0], [0.0]])
    metrics, weights = sampler_metrics(
        OLD, SAMPLED, mask, ratio_of(OLD, SAMPLED, mask, "sequence_mask", None, 3.0)
    )
    assert [metrics[f"{RATIO}/{kind}"] for kind in ("min", "mean", "max")] == pytest.approx([2.0, 2.0, 2.0])
    assert weights[f"{RATIO}/mean"] == 1.0


def test_without_a_correction_only_the_difference_is_measured() -> None:
    assert set(sampler_metrics(OLD, SAMPLED, MASK, None)[0]) == {f"{DIFFERENCE}/mean", f"{DIFFERENCE}/max"}


def test_an_engine_that_reports_nothing_has_no_difference_and_weights_of_one() -> None:
    unknown = torch.full_like(OLD, NAN)
    ratio = ratio_of(OLD, unknown, MASK, "token_mask", None, 3.0)
    assert torch.equal(ratio, torch.ones(2, 3))
    metrics, _ = sampler_metrics(OLD, unknown, MASK, ratio)
    assert metrics == {f"{RATIO}/min": 1.0, f"{RATIO}/mean": 1.0, f"{RATIO}/max": 1.0}


def test_a_pack_without_a_token_to_train_on_has_no_metrics() -> None:
    nothing = torch.zeros_like(MASK)
    assert sampler_metrics(OLD, SAMPLED, nothing, torch.ones(2, 1)) == ({}, {})


logprob = st.one_of(st.floats(-1e4, 0, width=32), st.sampled_from([-INF, 0.0]))


@st.composite
def tokens(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Old and sampling log-probabilities, some infinite or unknown, and a ragged mask: (B, T) each."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def matrix(values: Any) -> torch.Tensor:
        row = st.lists(values, min_size=width, max_size=width)
        return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float32)

    return matrix(logprob), matrix(st.one_of(logprob, st.just(NAN))), matrix(st.sampled_from([0.0, 1.0]))


bounds = st.tuples(st.none() | st.floats(0.01, 1), st.none() | st.floats(1, 1e6))


@settings(deadline=None)
@given(tokens(), st.sampled_from(MODES), bounds)
def test_weights_are_finite_within_the_bounds_and_one_where_nothing_is_known(
    given_tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mode: str,
    limits: tuple[float | None, float | None],
) -> None:
    old, sampled, mask = given_tokens
    ratio = ratio_of(old, sampled, mask, mode, *limits)
    known = mask.bool() & ~(old - sampled).isnan()
    if mode.startswith("sequence"):
        known = known.any(1, keepdim=True)
    assert ratio.shape == known.shape
    assert ratio.isfinite().all()
    assert (ratio[~known] == 1).all()
    low, high = limits[0] or 0.0, limits[1] or INF
    slack = 1e-6
    inside = (ratio >= low * (1 - slack)) & (ratio <= high * (1 + slack))
    assert (inside | (ratio == 0)).all() if mode.endswith("mask") else inside.all()


@settings(deadline=None)
@given(tokens(), st.sampled_from(MODES))
def test_the_same_probabilities_have_weights_of_exactly_one(
    given_tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor], mode: str
) -> None:
    old, _, mask = given_tokens
    assert (ratio_of(old, old.clone(), mask, mode, 0.999, 1.001) == 1).all()


@settings(deadline=None)
@given(tokens(), st.sampled_from(MODES))
def test_what_stands_on_padding_and_unknown_tokens_has_no_influence(
    given_tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor], mode: str
) -> None:
    old, sampled, mask = given_tokens
    ratio = ratio_of(old, sampled, mask, mode, 0.5, 3.0)
    other_old = torch.where(mask.bool() & ~sampled.isnan(), old, -1.5)
    other_sampled = torch.where(mask.bool(), sampled, NAN)
    assert torch.equal(ratio_of(other_old, other_sampled, mask, mode, 0.5, 3.0), ratio)


@settings(deadline=None)
@given(tokens(), bounds)
def test_a_completion_weighs_the_product_of_its_tokens(
    given_tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor], limits: tuple[float | None, float | None]
) -> None:
    old, sampled, mask = given_tokens
    old = old.clamp(min=-1e4)
    sampled = old + (sampled - old).clamp(-4, 4)  # so that no product leaves float32's range
    per_token = ratio_of(old, sampled, mask, "token_truncate", None, None)
    product = per_token.double().prod(1, keepdim=True).clamp(limits[0] or 0.0, limits[1] or INF)
    ratio = ratio_of(old, sampled, mask, "sequence_truncate", *limits)
    torch.testing.assert_close(ratio.double(), product, rtol=1e-4, atol=1e-6)


def test_sums_too_large_for_exp_are_held_where_zero_times_them_is_zero() -> None:
    old, sampled = torch.zeros(1, 500), torch.full((1, 500), -30.0)
    ratio = ratio_of(old, sampled, torch.ones(1, 500), "sequence_truncate", 0.1, None)
    assert ratio.item() == pytest.approx(math.exp(LOG_RATIO_LIMIT), rel=1e-5)
    assert (ratio * 0).item() == 0
    assert ratio_of(old, sampled, torch.ones(1, 500), "sequence_mask", None, 3.0).item() == 0


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [(loss, mode) for loss in ("dapo", "grpo", "cispo", "sapo") for mode in MODES]
    + [("vespo", "token_truncate"), ("vespo", "token_mask")],
)
def test_loss_gradient_and_metrics_do_not_depend_on_the_split(loss_type: str, mode: str) -> None:
    generator = torch.Generator().manual_seed(5)
    rows, width = 7, 9
    config = LossConfig(type=loss_type, off_policy_threshold=0.2)  # type: ignore[arg-type]
    logprobs = -torch.rand(rows, width, generator=generator) * 3
    old = logprobs + 0.1 * torch.randn(rows, width, generator=generator)
    sampled = old + 0.4 * torch.randn(rows, width, generator=generator)
    sampled[torch.rand(rows, width, generator=generator) < 0.2] = NAN
    advantages = torch.randn(rows, generator=generator)
    lengths = torch.tensor([9, 1, 0, 4, 7, 2, 5])
    mask = (torch.arange(width) < lengths[:, None]).float()
    normalizer = loss_normalizer(mask, config, 12)

    def step(parts: list[list[int]]) -> tuple[float, torch.Tensor, dict[str, float]]:
        policy = logprobs.clone().requires_grad_()
        means, total = MetricMeans(), 0.0
        for p in parts:
            ratio = ratio_of(old[p], sampled[p], mask[p], mode, 0.3, 1.7)
            output = policy_loss(
                policy[p], old[p], advantages[p], mask[p], config,
                normalizer=normalizer, sampling_logprobs=sampled[p], importance_ratio=ratio,
            )  # fmt: skip
            output.loss.backward()
            total += output.loss.item()
            means.add(output)
        assert policy.grad is not None
        return total, policy.grad, means.result(Ranks())

    whole = step([list(range(rows))])
    split = step([[0, 1], [2], [3, 4, 5], [6]])
    assert math.isfinite(whole[0])
    assert whole[1].any()
    assert whole[0] == pytest.approx(split[0], rel=1e-5)
    torch.testing.assert_close(whole[1], split[1])
    assert whole[2] == pytest.approx(split[2], rel=1e-5)
    names = {f"{DIFFERENCE}/{kind}" for kind in ("mean", "max")}
    assert names | {f"{RATIO}/{kind}" for kind in ("min", "mean", "max")} <= set(whole[2])
    assert whole[2][f"{RATIO}/min"] < whole[2][f"{RATIO}/mean"] < whole[2][f"{RATIO}/max"]


@pytest.mark.parametrize("mode", ["token_mask", "sequence_mask"])
def test_the_weight_is_on_the_policy_term_alone(mode: str) -> None:
    """Where every weight is 0, the KL is all that is left."""
    config = LossConfig(beta=0.5)
    old, mask = torch.full((1, 4), -1.0), torch.ones(1, 4)
    sampled, ref = old - 2, old - 1
    ratio = ratio_of(old, sampled, mask, mode, None, 1.5)
    output = policy_loss(
        old, old, torch.ones(1), mask, config,
        normalizer=4.0, ref_logprobs=ref, sampling_logprobs=sampled, importance_ratio=ratio,
    )  # fmt: skip
    assert output.loss.item() == pytest.approx(0.5 * math.exp(-1))
