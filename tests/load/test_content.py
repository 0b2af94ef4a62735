"""What is not of the weights that it should be of is found by its log-probabilities."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import tiny_llama
from tests.integration.serving import reference_logprobs
from tests.load.content import Completion, completions_of, judge, versioned
from tests.load.requests import Sampled

PROMPT = (5, 6, 7)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def completion(model: Any, version: int, *tokens: int) -> Completion:
    logprobs = reference_logprobs(versioned(model, version), PROMPT, tokens, 0.7)
    return Completion(PROMPT, tokens, tuple(logprobs.tolist()), 0.7, range(version, version + 1))


def test_completions_of_the_right_versions_are_right(model: Any) -> None:
    verdict = judge([completion(model, 1, 9, 8), completion(model, 0, 4), completion(model, 2, 9, 8, 7)], model)
    assert (verdict.wrong, verdict.completions) == ([], 3)
    assert verdict.largest < 1e-5
    assert verdict.told_apart == 3, "the version before, or after the first, would have been noticed"


@pytest.mark.parametrize("said", [range(2, 3), range(0, 1), range(2, 5)])
def test_a_completion_of_another_version_is_wrong(model: Any, said: range) -> None:
    right = completion(model, 2, 9, 8, 7)
    verdict = judge([replace(completion(model, 1, 9, 8, 7), versions=said), right], model)
    assert len(verdict.wrong) == 1
    assert str(said) in verdict.wrong[0]


def test_one_of_several_versions_that_were_there_is_enough(model: Any) -> None:
    assert judge([replace(completion(model, 2, 9, 8), versions=range(1, 4))], model).wrong == []


def test_each_version_has_weights_of_its_own_and_always_the_same(model: Any) -> None:
    once, again, other = (versioned(model, version).lm_head.weight for version in (3, 3, 4))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(versioned(model, 0).lm_head.weight, model.lm_head.weight)


def test_answers_of_both_protocols_and_streams_are_read(model: Any) -> None:
    ours = {"completions": [{"token_ids": [3, 4], "logprobs": [-1.0, -2.0], "finish_reason": "length"}]}
    logprobs = {"tokens": ["token_id:3", "token_id:4"], "token_logprobs": [-1.0, -2.0]}
    whole = {"choices": [{"index": 0, "logprobs": logprobs}]}
    events = [
        {"choices": [{"index": 0, "logprobs": {name: [values[place]] for name, values in logprobs.items()}}]}
        for place in range(2)
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    asked = Sampled(PROMPT, 1, 2, 1.0, True)
    expected = [Completion(PROMPT, (3, 4), (-1.0, -2.0), 1.0, range(1))]
    assert completions_of(asked, json.dumps(ours).encode(), range(1)) == expected
    assert completions_of(asked, json.dumps(whole).encode(), range(1)) == expected
    assert completions_of(replace(asked, streams=True), stream.encode(), range(1)) == expected
    with pytest.raises(ValueError, match="asked for 2 of 2 tokens"):
        completions_of(replace(asked, n=2), json.dumps(ours).encode(), range(1))
    with pytest.raises(ValueError, match="the stream ends"):
        completions_of(replace(asked, streams=True), stream.encode()[:-20], range(1))
