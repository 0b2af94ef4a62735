"""The KL estimators are Schulman's, and their expectations are the KL."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.algorithm.kl import token_kl

LOGPROB = st.floats(-8, 0)


def test_each_estimator_is_its_equation() -> None:
    policy, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -0.5]])
    difference = torch.tensor([[-0.5, 1.5]])
    torch.testing.assert_close(token_kl(policy, ref, "k1"), -difference)
    torch.testing.assert_close(token_kl(policy, ref, "k2"), difference**2 / 2)
    torch.testing.assert_close(token_kl(policy, ref, "k3"), difference.exp() - difference - 1)
    torch.testing.assert_close(token_kl(policy, ref), token_kl(policy, ref, "k3"))


@settings(deadline=None)
@given(st.lists(st.tuples(LOGPROB, LOGPROB), min_size=1, max_size=8))
def test_k2_and_k3_are_never_negative_and_all_are_zero_at_the_reference(pairs: list[tuple[float, float]]) -> None:
    policy, ref = torch.tensor(pairs, dtype=torch.float64).T
    for estimator in ("k2", "k3"):
        assert (token_kl(policy, ref, estimator) >= -1e-12).all()
    for estimator in ("k1", "k2", "k3"):
        assert (token_kl(policy, policy, estimator) == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_over_the_policy_is_the_kl(estimator: str) -> None:
    generator = torch.Generator().manual_seed(1)
    policy, ref = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    kl = (policy.exp() * (policy - ref)).sum()
    mean = (policy.exp() * token_kl(policy, ref, estimator)).sum()  # type: ignore[arg-type]
    torch.testing.assert_close(mean, kl)


def test_the_gradient_flows_into_the_policy() -> None:
    policy = torch.tensor([-1.0], requires_grad=True)
    ref = torch.tensor([-3.0])
    (gradient,) = torch.autograd.grad(token_kl(policy, ref).sum(), policy)
    torch.testing.assert_close(gradient, 1 - (ref - policy).exp().detach())
