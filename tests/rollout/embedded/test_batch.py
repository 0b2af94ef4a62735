"""The host looks at what was drawn as seldom as it is told to, and gets the same completions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig

from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe import limits
from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.embedded import batch, decode_graphs
from grpo_cli.rollout.embedded.decode_graphs import DecodeGraphs
from grpo_cli.rollout.embedded.engine import EmbeddedEngine
from tests.conftest import byte_tokenizer, tiny_llama
from tests.rollout.driving import Driven
from tests.rollout.embedded.tape import Tape, waits_seen

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18]]
KEYS = [(42, index) for index in range(len(PROMPTS))]
RAGGED_EOS = [256, *range(0, 256, 8)]
NEW_TOKENS = 12
LOOK = ["tolist", "tolist"]
"""A look at tokens and log-probabilities."""

OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3, "top_p": 0.9, "temperature": 0.7},
    {"top_k": 5, "min_p": 0.01},
    {"stop": ["a", "qz"]},
]


def model_of(kind: str, eos: list[int]) -> Any:
    if kind == "sliding window":
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 4}
        model = AutoModelForCausalLM.from_config(MistralConfig(**sizes, eos_token_id=eos))
    else:
        model = tiny_llama(eos_token_id=eos)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    return model.eval()


def engine_of(model: Any, autocast: Any = nullcontext, **options: Any) -> Driven:
    config = GenerationConfig(**({"max_completion_tokens": NEW_TOKENS} | options))
    return Driven(EmbeddedEngine(PackedModel.checked(model), byte_tokenizer(), config, autocast))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cache_tokens", [65_536, 150])
@pytest.mark.parametrize("look_every", [2, 5, 100])
def test_how_often_the_host_looks_changes_no_completion(
    options: dict[str, Any], cache_tokens: int, look_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model_of("llama", RAGGED_EOS), **options)
    expected = engine.generate(PROMPTS, KEYS, 4)
    monkeypatch.setitem(batch.LOOK_EVERY, "cpu", look_every)
    monkeypatch.setattr(limits, "CACHE_TOKENS", cache_tokens)
    for ours, theirs in zip(engine.generate(PROMPTS, KEYS, 4), expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)  # fewer rows may round in another way


@pytest.mark.parametrize("with_graphs", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "lora", "sliding window"])
def test_a_decoding_step_waits_for_nothing_until_the_host_looks(
    kind: str, options: dict[str, Any], autocast: bool, with_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(batch.LOOK_EVERY, "cpu", 4)
    monkeypatch.setattr(decode_graphs, "EAGER_STEPS", NEW_TOKENS if with_graphs else 0)  # counted, never recorded
    model = model_of(kind, [259])
    engine = engine_of(
        model, (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if autocast else nullcontext, **options
    )
    engine.graphs = DecodeGraphs(pytest.fail, Tape) if with_graphs else None
    with waits_seen(model, monkeypatch) as seen:
        engine.generate(PROMPTS, KEYS, 2)
    _, prefill, *decoding = seen.by_step()
    assert prefill[-2:] == LOOK
    if "stop" not in options:
        assert decoding == [LOOK if step in (4, 8, 11) else [] for step in range(1, NEW_TOKENS)]
    else:
        assert [len(waited) for waited in decoding if waited] == [2] * len(
            [waited for waited in decoding if waited]
        )


def test_rows_that_end_make_the_host_wait_only_when_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batch.LOOK_EVERY, "cpu", 3)
    monkeypatch.setattr(limits, "CACHE_TOKENS", 100)  # groups come and go
    model = model_of("llama", RAGGED_EOS)
    engine = engine_of(model)
    with waits_seen(model, monkeypatch) as seen:
        engine.generate(PROMPTS, KEYS, 3)
    prefills = "aten.repeat_interleave.Tensor"  # of what is still on the CPU
    steps = [[event for event in events if event != prefills] for events in seen.by_step()]
    assert all(events in ([], LOOK) for events in steps)
    assert steps.count(LOOK) < len(steps) - 5
