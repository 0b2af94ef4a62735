"""Seeds follow from the key alone, and what vLLM gives becomes a completion."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from grpo_cli.recipe.sampling import Sampling
from grpo_cli.rollout.with_vllm import sampled_turn, save_for_vllm, seed_of
from grpo_cli.serve.protocol import SampledTokens
from tests.conftest import byte_tokenizer, tiny_llama
from tests.rollout.driving import first_turns


def test_the_same_key_has_the_same_seed_and_no_other_has() -> None:
    keys = [*product(range(3), [0], range(20), range(3)), *product(range(3), [1, 2], range(20))]
    seeds = [seed_of(first_turns([5], key, 1, 8)[0]) for key in keys]
    assert seeds == [seed_of(first_turns([6, 7], key, 1, 9)[0]) for key in keys]
    # Each completion adds its index: the seeds of whole groups must not meet either.
    by_value = sorted(seeds)
    assert len(by_value) == len(keys)
    assert min(after - before for before, after in pairwise(by_value)) > 10_000


def test_a_group_s_first_turns_have_seeds_in_a_row_and_later_ones_their_own() -> None:
    turns = first_turns([5], (1, 2), 4, 8)
    first = seed_of(turns[0])
    assert [seed_of(turn) for turn in turns] == [first, first + 1, first + 2, first + 3]
    later = [seed_of(replace(turn, number=number)) for turn in turns for number in (1, 2)]
    assert len({*later, first, first + 1, first + 2, first + 3}) == 12


def test_a_seed_fits_vllm_s_integer_with_room_for_every_completion() -> None:
    largest = max(seed_of(first_turns([5], (0, step), 1, 8)[0]) for step in range(200))
    assert 2**60 < largest < 2**63 - 10_000


def sampled(text: str, reason: Any = "stop") -> SampledTokens:
    tokens = byte_tokenizer()(text)["input_ids"]
    return SampledTokens(token_ids=tokens, logprobs=[-0.25] * len(tokens), finish_reason=reason)


def test_a_completion_keeps_its_tokens_and_log_probabilities() -> None:
    one = sampled_turn(sampled("héllo", "length"), Sampling(), byte_tokenizer())
    assert (one.text, one.finish_reason) == ("héllo", "length")
    assert one.logprobs == [-0.25] * len(one.token_ids) == [-0.25] * 6


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_log_probabilities_of_a_filtered_distribution_are_not_known(filters: dict[str, Any]) -> None:
    one = sampled_turn(sampled("abc"), Sampling(**filters), byte_tokenizer())
    assert len(one.logprobs) == 3
    assert all(map(math.isnan, one.logprobs))


def test_a_temperature_is_no_filter() -> None:
    assert sampled_turn(sampled("abc"), Sampling(temperature=0.5), byte_tokenizer()).logprobs == [-0.25] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [("one\ntwo", "one"), ("one END two\n", "one "), ("one", "one"), ("\n", ""), ("<|end|>", "")],
)
def test_the_text_ends_before_the_first_stop_string_and_has_no_special_tokens(text: str, expected: str) -> None:
    part = sampled(text)
    one = sampled_turn(part, Sampling(stop=["END", "\n"]), byte_tokenizer())
    assert one.text == expected
    assert one.token_ids == part.token_ids, "tokens are what was sampled, the stop string too"


def test_vllm_is_told_what_kind_of_model_it_is_whether_the_policy_was_loaded_or_made(tmp_path: Path) -> None:
    model = tiny_llama()
    assert model.config.architectures is None, "or the test could not fail"
    save_for_vllm(model, byte_tokenizer(), tmp_path / "model")
    assert AutoConfig.from_pretrained(tmp_path / "model").architectures == ["LlamaForCausalLM"]
    assert model.config.architectures is None, "the policy is left alone"
