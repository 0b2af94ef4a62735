"""What is asked of vLLM follows from the recipe and the key alone."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest

from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.vllm_requests import completion, generate_request
from grpo_cli.serve.protocol import GenerateRequest, ServedCompletion, Weights
from tests.conftest import byte_tokenizer

PROMPT = [5, 6, 7]


def request(key: tuple[int, ...] = (0, 0, 0), n: int = 4, **settings: Any) -> GenerateRequest:
    return generate_request(GenerationConfig(**settings), {256}, PROMPT, key, n)


def test_a_request_says_what_the_recipe_says() -> None:
    config = GenerationConfig(
        max_completion_tokens=9,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        stop=["\n"],
    )
    weights = Weights(run="r", version=2)
    asked = generate_request(config, {300, 2, 10}, (5, 6, 7), (1, 0, 4), 8, weights)
    assert asked.model_dump(exclude={"seed"}) == {
        "token_ids": PROMPT, "n": 8, "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
        "repetition_penalty": 1.2, "stop": ["\n"], "stop_token_ids": [2, 10, 300],
        "weights": {"run": "r", "version": 2},
    }  # fmt: skip


def test_the_same_key_has_the_same_seed_and_no_other_has() -> None:
    keys = [*product(range(3), [0], range(20), range(3)), *product(range(3), [1, 2], range(20))]
    seeds = [request(key).seed for key in keys]
    assert seeds == [request(key).seed for key in keys]
    assert request((1, 0, 2)).seed == request((1, 0, 2), n=8, temperature=0.5).seed
    # Each completion adds its index: the seeds of whole groups must not meet either.
    by_value = sorted(seed for seed in seeds if seed is not None)
    assert len(by_value) == len(keys)
    assert min(after - before for before, after in pairwise(by_value)) > 10_000


def test_a_seed_fits_vllm_s_integer_with_room_for_every_completion() -> None:
    largest = max(request((0, step)).seed or 0 for step in range(200))
    assert 2**60 < largest < 2**63 - 10_000


def served(text: str, reason: Any = "stop") -> ServedCompletion:
    tokens = byte_tokenizer()(text)["input_ids"]
    return ServedCompletion(token_ids=tokens, logprobs=[-0.25] * len(tokens), finish_reason=reason)


def test_a_completion_keeps_its_tokens_and_log_probabilities() -> None:
    one = completion(served("héllo", "length"), GenerationConfig(), byte_tokenizer())
    assert (one.text, one.finish_reason) == ("héllo", "length")
    assert one.logprobs == [-0.25] * len(one.token_ids) == [-0.25] * 6


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_log_probabilities_of_a_filtered_distribution_are_not_known(filters: dict[str, Any]) -> None:
    one = completion(served("abc"), GenerationConfig(**filters), byte_tokenizer())
    assert len(one.logprobs) == 3
    assert all(map(math.isnan, one.logprobs))


def test_a_temperature_is_no_filter() -> None:
    assert completion(served("abc"), GenerationConfig(temperature=0.5), byte_tokenizer()).logprobs == [-0.25] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("one\ntwo", "one"), ("one END two\n", "one "), ("one", "one"), ("\n", ""), ("<|end|>", "")],
)
def test_the_text_ends_before_the_first_stop_string_and_has_no_special_tokens(text: str, expected: str) -> None:
    part = served(text)
    one = completion(part, GenerationConfig(stop=["END", "\n"]), byte_tokenizer())
    assert one.text == expected
    assert one.token_ids == part.token_ids, "tokens are what was sampled, the stop string too"
