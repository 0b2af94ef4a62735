"""The losses agree with TRL's own, run, and do not depend on how a step is split."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.algorithm.losses import (
    groups_to_forward,
    high_entropy_threshold,
    loss_normalizer,
    masked_quantile,
    policy_loss,
)
from grpo_cli.algorithm.surrogates import SURROGATES
from grpo_cli.recipe.loss_types import LOSS_TYPES
from grpo_cli.recipe.schema import LossConfig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_losses.json").read_text())["cases"]


def config_of(options: dict[str, Any]) -> LossConfig:
    return LossConfig(
        type=options["loss_type"],
        beta=options["beta"],
        epsilon=options["epsilon"],
        epsilon_high=options["epsilon_high"],
        delta=options["delta"],
        importance_level=options["importance_sampling_level"],
        bias_corrected_kl=options["bias_corrected_kl"],
        off_policy_threshold=options["off_policy_threshold"],
        top_entropy_quantile=options["top_entropy_quantile"],
    )


def case_id(case: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in case["options"].items() if value)


@pytest.mark.parametrize("case", GOLDEN, ids=case_id)
def test_loss_gradient_and_metrics_equal_trl(case: dict[str, Any]) -> None:
    config = config_of(case["options"])
    logprobs = torch.tensor(case["logprobs"], requires_grad=True)
    mask = torch.tensor(case["mask"])
    ratio = None if case["importance_ratio"] is None else torch.tensor(case["importance_ratio"])
    output = policy_loss(
        logprobs,
        torch.tensor(case["old_logprobs"]),
        torch.tensor(case["advantages"]),
        mask,
        config,
        normalizer=loss_normalizer(mask, config, case["max_completion_length"]),
        ref_logprobs=torch.tensor(case["ref_logprobs"]),
        sampling_logprobs=torch.tensor(case["sampling_logprobs"]),
        entropies=torch.tensor(case["entropies"]),
        importance_ratio=ratio,
    )
    output.loss.backward()
    assert output.loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(logprobs.grad, torch.tensor(case["grad"]), rtol=1e-5, atol=1e-5)
    for name, value in case["metrics"].items():
        assert output.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("extra", [{}, {"beta": 0.1}, {"entropy_coef": 0.3}, {"top_entropy_quantile": 0.4}])
def test_loss_and_gradient_do_not_depend_on_the_split(loss_type: str, extra: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, width = 7, 9
    config = LossConfig(type=loss_type, **extra)  # type: ignore[arg-type]
    logprobs = -torch.rand(rows, width, generator=generator) * 3
    old = logprobs + 0.3 * torch.randn(rows, width, generator=generator)
    ref = logprobs + 0.3 * torch.randn(rows, width, generator=generator)
    entropies = torch.rand(rows, width, generator=generator) * 3
    advantages = torch.randn(rows, generator=generator)
    lengths = torch.tensor([9, 1, 0, 4, 7, 2, 5])
    mask = (torch.arange(width) < lengths[:, None]).float()
    normalizer = loss_normalizer(mask, config, 12)
    threshold = high_entropy_threshold(entropies, mask, config.top_entropy_quantile)

    def gradient(parts: list[list[int]]) -> tuple[float, torch.Tensor, torch.Tensor]:
        policy = logprobs.clone().requires_grad_()
        entropy = entropies.clone().requires_grad_()
        assert sum(loss_normalizer(mask[p], config, 12) for p in parts) == pytest.approx(normalizer)
        total = 0.0
        for p in parts:
            output = policy_loss(
                policy[p],
                old[p],
                advantages[p],
                mask[p],
                config,
                normalizer=normalizer,
                ref_logprobs=ref[p],
                entropies=entropy[p],
                entropy_threshold=threshold,
            )
            output.loss.backward()
            total += output.loss.item()
        assert policy.grad is not None
        return total, policy.grad, entropy.grad if entropy.grad is not None else torch.zeros(())

    whole = gradient([list(range(rows))])
    split = gradient([[0, 1], [2], [3, 4, 5], [6]])
    assert whole[0] == pytest.approx(split[0], rel=1e-5)
    torch.testing.assert_close(whole[1], split[1])
    torch.testing.assert_close(whole[2], split[2])


def test_every_surrogate_is_of_some_loss_type() -> None:
    assert SURROGATES.keys() == {row.surrogate for row in LOSS_TYPES.values()}


@pytest.mark.parametrize(
    ("loss_type", "normalizer"),
    [("grpo", 2), ("bnpo", 5), ("dr_grpo", 18), ("dapo", 5), ("luspo", 2), ("cispo", 5), ("sapo", 2), ("vespo", 5),
     ("my:loss", 5)],
)  # fmt: skip
def test_what_a_step_divides_by(loss_type: str, normalizer: int) -> None:
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    assert loss_normalizer(mask, LossConfig(type=loss_type), 9) == normalizer


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_with_every_token_masked_has_zero_loss_and_finite_gradient(loss_type: str) -> None:
    config = LossConfig(type=loss_type)
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.zeros(2, 3)
    output = policy_loss(
        logprobs,
        logprobs.detach(),
        torch.ones(2),
        mask,
        config,
        normalizer=loss_normalizer(mask, config, 3),
        entropies=torch.ones(2, 3),
    )
    output.loss.backward()
    assert output.loss.item() == 0
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, torch.zeros(2, 3))


def test_entropy_bonus_rewards_entropy() -> None:
    config = LossConfig(entropy_coef=0.5)
    entropies = torch.ones(1, 4, requires_grad=True)
    mask = torch.ones(1, 4)
    zeros = torch.zeros(1, 4)
    output = policy_loss(zeros, zeros, torch.zeros(1), mask, config, normalizer=4.0, entropies=entropies)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-0.5)
    torch.testing.assert_close(entropies.grad, torch.full((1, 4), -0.125))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [True, False, False, False]),
        ({"beta": 0.1}, [True, True, True, False]),
        ({"entropy_coef": 0.1}, [True, True, True, False]),
        ({"top_entropy_quantile": 0.5}, [True, True, True, False]),
        ({"off_policy_threshold": 0.1, "importance_level": "sequence"}, [True, False, False, False]),
        ({"type": "my:loss"}, [True, True, True, False]),
    ],
    ids=str,
)
def test_a_group_is_forwarded_if_a_completion_of_it_can_have_a_gradient(
    options: dict[str, Any], expected: list[bool]
) -> None:
    advantages = torch.tensor([0.0, -1e-6, 0.0, 0.0, 0.0, 2.0, 1.0, -1.0])
    trained = torch.tensor([True, True, True, True, True, False, False, False])
    assert groups_to_forward(advantages, trained, 2, LossConfig(**options)).tolist() == expected


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_completions_without_an_advantage_have_a_gradient_of_exactly_zero(loss_type: str, level: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, sampling = (-torch.rand(3, 4, generator=generator) * 5 for _ in range(3))
    logprobs.requires_grad_()
    level = "token" if LOSS_TYPES[loss_type].weighs_completions else level
    config = LossConfig(type=loss_type, importance_level=level, off_policy_threshold=0.1)  # type: ignore[arg-type]
    output = policy_loss(
        logprobs, old, torch.zeros(3), torch.ones(3, 4), config, normalizer=7.0, sampling_logprobs=sampling
    )
    output.loss.backward()
    assert output.loss.item() == 0
    assert logprobs.grad is not None
    assert not logprobs.grad.any()


values_and_masks = st.lists(
    st.tuples(st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0]), st.booleans()), min_size=1, max_size=60
).filter(lambda pairs: any(kept for _, kept in pairs))


@settings(deadline=None)
@given(values_and_masks, st.floats(0, 1) | st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), st.booleans())
def test_a_quantile_is_torchs_to_the_bit(pairs: list[tuple[float, bool]], quantile: float, has_nan: bool) -> None:
    values = torch.tensor([value for value, _ in pairs])
    mask = torch.tensor([kept for _, kept in pairs])
    if has_nan:
        values[0] = math.nan
    expected = torch.quantile(values[mask], quantile)
    torch.testing.assert_close(masked_quantile(values, mask, quantile), expected, rtol=0, atol=0, equal_nan=True)


def test_the_entropy_threshold_of_more_tokens_than_torchs_quantile_takes() -> None:
    count = 2**24 + 3
    entropies = torch.arange(count, dtype=torch.float32).flip(0) / count
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(entropies, 0.8)
    threshold = high_entropy_threshold(entropies, torch.ones(count), 0.2)
    assert threshold.item() == pytest.approx(0.8, abs=2e-5)
    kept = (entropies >= threshold).float().mean().item()
    assert kept == pytest.approx(0.2, abs=2e-5)
    assert masked_quantile(entropies, torch.ones(count, dtype=torch.bool), 1.0) == entropies.max()


@pytest.mark.parametrize("shape", [(0, 4), (2, 3)])
def test_no_token_at_all_has_no_entropy_high_enough(shape: tuple[int, int]) -> None:
    assert high_entropy_threshold(torch.ones(shape), torch.zeros(shape), 0.2) == math.inf
