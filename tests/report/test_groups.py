"""What is said of a group is what its completions say together."""

from __future__ import annotations

import pytest

from grpo_cli.record.completions import StoredCompletion
from grpo_cli.report.groups import groups_of


def completion(
    group: int, sample: int, rewards: dict[str, float | None], trained: bool = True
) -> StoredCompletion:
    return StoredCompletion(
        step=1, group=group, sample=sample, prompt="p", completion="c", num_sampled=sample + 1,
        finish_reason="length" if sample else "stop", advantage=0.0, rewards=rewards, extras={}, token_ids=[1],
        token_texts=["c"], logprobs=[-1.0], policy_logprobs=[-1.0 if trained else None], sampled=[True],
    )  # fmt: skip


def test_rewards_are_weighed_and_what_did_not_apply_is_left_out() -> None:
    first, second = groups_of(
        [
            completion(0, 0, {"a": 1.0, "b": 2.0}),
            completion(0, 1, {"a": None, "b": 1.0}),
            completion(1, 0, {"a": None, "b": None}, trained=False),
            completion(1, 1, {"a": None, "b": None}, trained=False),
        ],
        {"a": 3.0},
    )
    assert first.rewards == [5.0, 1.0]
    assert first.spread == pytest.approx(8**0.5)
    assert (first.mean_of("a"), first.mean_of("b")) == (1.0, 1.5)
    assert (first.lengths, first.truncated, first.is_trained_on) == ([1, 2], 1, True)
    assert second.rewards == [None, None]
    assert (second.group, second.spread, second.mean_of("a"), second.is_trained_on) == (1, 0.0, None, False)
