"""vLLM is told of every sampling setting."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from grpo_cli.recipe.sampling import Sampling
from grpo_cli.serve.sampling import sampling_params

OTHERS: dict[str, Any] = {
    "max_completion_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
    "repetition_penalty": 1.2, "stop": ["END"],
}  # fmt: skip


def params_of(**settings: Any) -> dict[str, Any]:
    params = sampling_params(Sampling(**settings), n=4, seed=7, stop_token_ids=[2, 300])
    return {name: getattr(params, name) for name in params.__struct_fields__}


@pytest.mark.parametrize("name", Sampling.model_fields)
def test_vllm_is_told_of_every_setting(name: str) -> None:
    value = OTHERS[name]
    default, other = params_of(), params_of(**{name: value})
    theirs = {"max_completion_tokens": "max_tokens"}.get(name, name)
    assert default[theirs] != value
    assert other[theirs] == value


def test_only_the_tokens_that_are_named_end_a_completion() -> None:
    params = params_of()
    assert (params["n"], params["seed"], params["stop_token_ids"]) == (4, 7, [2, 300])
    assert params["ignore_eos"], "the model's own token does not"
    assert params["logprobs"] == 0, "that of the sampled token alone"
