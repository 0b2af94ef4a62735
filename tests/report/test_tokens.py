"""What is said of single tokens is what the loss computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grpo_cli.algorithm.losses import importance_ratio_of_level
from grpo_cli.algorithm.surrogates import SURROGATES, SurrogateInputs
from grpo_cli.recipe.schema import LossConfig
from grpo_cli.record.completions import StoredCompletion
from grpo_cli.report.tokens import token_losses, token_ratios

SAMPLER = [-1.0, -2.0, -0.5, -3.0, None, -1.0]
POLICY = [-1.0, -1.5, -1.5, -3.1, -2.0, None]


def completion(advantage: float, sampler: Any = SAMPLER, policy: Any = POLICY) -> StoredCompletion:
    count = len(sampler)
    return StoredCompletion(
        step=1, group=0, sample=0, prompt="p", completion="c", num_sampled=count, finish_reason="stop",
        advantage=advantage, rewards={}, extras={}, token_ids=[0] * count, token_texts=["a"] * count,
        logprobs=sampler, policy_logprobs=policy, sampled=[True] * count,
    )  # fmt: skip


def test_a_ratio_is_of_policy_over_sampler_where_both_are_known() -> None:
    ratios = token_ratios(completion(1.0))
    assert ratios[:4] == pytest.approx([1.0, math.exp(0.5), math.exp(-1), math.exp(-0.1)])
    assert ratios[4:] == [None, None]
    assert math.isfinite(token_ratios(completion(1.0, [-1e4], [0.0]))[0] or math.inf)


@pytest.mark.parametrize("advantage", [1.5, -0.7, 0.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epsilon_high": 0.8},
        {"delta": 1.1},
        {"type": "cispo", "epsilon_high": 1.2},
        {"type": "sapo"},
        {"importance_level": "sequence"},
    ],
    ids=str,
)
def test_a_tokens_loss_is_the_losses_own(settings: dict[str, Any], advantage: float) -> None:
    config = LossConfig(**settings)
    logprobs, sampler = torch.tensor([POLICY[:4]]), torch.tensor([SAMPLER[:4]])
    mask, log_ratio = torch.ones(1, 4), logprobs - sampler
    ratio = importance_ratio_of_level(log_ratio, mask, config)
    inputs = SurrogateInputs(logprobs, log_ratio, ratio, torch.tensor([[advantage]]), mask, None)
    wanted = SURROGATES[config.row.surrogate](inputs, config).token_loss.expand(1, 4)[0].tolist()
    losses = token_losses(completion(advantage), config)
    assert losses[:4] == pytest.approx(wanted, abs=1e-6)
    assert losses[4:] == [None, None]


@pytest.mark.parametrize("kind", ["vespo", "my_losses:mine"])
def test_losses_that_are_not_of_single_tokens_say_nothing(kind: str) -> None:
    assert token_losses(completion(1.0), LossConfig(type=kind)) == [None] * 6
