"""Sampling is transformers' own, decided by the key alone, and computes nothing twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    LogitsProcessorList,
    MambaConfig,
    MinPLogitsWarper,
    MistralConfig,
    Phi3Config,
    RecurrentGemmaConfig,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_cli.algorithm.packing import Group, pack_groups
from grpo_cli.errors import UserError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe import limits
from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.embedded.engine import EmbeddedEngine, eos_token_ids
from grpo_cli.rollout.embedded.sampling import logits_processors, sample_tokens
from grpo_cli.rollout.engine import Completion, SampleKey, decoded, sample_uniforms
from tests.conftest import byte_tokenizer, tiny_llama
from tests.rollout.driving import Driven

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18]]
KEYS: list[SampleKey] = [(42, 0, 0, index) for index in range(len(PROMPTS))]
RAGGED_EOS = [256, *range(0, 256, 8)]
"""So many tokens end a completion that completions differ in length."""
JUST_BELOW_1 = math.nextafter(1.0, 0.0)

SMALL: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": RAGGED_EOS,
    "pad_token_id": None,
}
HEADS: dict[str, Any] = SMALL | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, Any] = {
    "gpt2": GPT2Config(
        vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=RAGGED_EOS
    ),
    "mistral with a sliding window": MistralConfig(**HEADS, sliding_window=4),
    "mamba": MambaConfig(**SMALL, state_size=4),
    "jamba": JambaConfig(**HEADS, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4),
}


def build(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def ragged_llama() -> Any:
    return tiny_llama(eos_token_id=RAGGED_EOS).eval()


def engine_of(model: Any, **generation: Any) -> Driven:
    config = GenerationConfig(**({"max_completion_tokens": 12} | generation))
    return Driven(EmbeddedEngine(PackedModel.checked(model), byte_tokenizer(), config, nullcontext))


def tokens(groups: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def record_shapes(model: Any) -> list[tuple[int, int]]:
    """(rows, tokens) of every forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    forward = model.forward

    def recording(*, input_ids: torch.Tensor, **arguments: Any) -> Any:
        shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return forward(input_ids=input_ids, **arguments)

    model.forward = recording
    return shapes


def test_the_same_key_gives_the_same_completions() -> None:
    first = engine_of(ragged_llama()).generate(PROMPTS, KEYS, 4)
    assert engine_of(ragged_llama()).generate(PROMPTS, KEYS, 4) == first
    lengths = {len(completion.token_ids) for group in first for completion in group}
    assert len(lengths) > 3, "the tests below mean something only if lengths differ"


def test_other_keys_and_other_places_in_the_group_give_other_completions() -> None:
    engine = engine_of(tiny_llama())
    (one,) = tokens(engine.generate(PROMPTS[:1], [(1, 2)], 6))
    (other,) = tokens(engine.generate(PROMPTS[:1], [(1, 3)], 6))
    assert len({tuple(ids) for ids in one + other}) == 12


@pytest.mark.parametrize("name", ["llama", *ARCHITECTURES])
def test_tokens_do_not_depend_on_what_is_generated_beside_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(ragged_llama() if name == "llama" else build(ARCHITECTURES[name]))
    together = tokens(engine.generate(PROMPTS, KEYS, 3))
    alone = [tokens(engine.generate([p], [k], 3))[0] for p, k in zip(PROMPTS, KEYS, strict=True)]
    assert alone == together
    backwards = tokens(engine.generate(PROMPTS[::-1], KEYS[::-1], 3))
    assert backwards[::-1] == together
    fewer = tokens(engine.generate(PROMPTS, KEYS, 2))
    assert fewer == [group[:2] for group in together]
    for cache_tokens in (1, 150):
        monkeypatch.setattr(limits, "CACHE_TOKENS", cache_tokens)
        assert tokens(engine.generate(PROMPTS, KEYS, 3)) == together


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("name", ["llama", *ARCHITECTURES])
def test_returned_logprobs_are_those_that_training_computes(name: str, temperature: float) -> None:
    model = ragged_llama() if name == "llama" else build(ARCHITECTURES[name])
    groups = engine_of(model, temperature=temperature, top_p=0.9).generate(PROMPTS, KEYS, 3)
    rollout = [
        Group(prompt, [completion.token_ids for completion in group], range(3 * i, 3 * i + 3))
        for i, (prompt, group) in enumerate(zip(PROMPTS, groups, strict=True))
    ]
    with torch.no_grad():
        (pack,) = pack_groups(rollout, 10_000, shared_prompt=False)
        logprobs, _ = PackedModel.checked(model).token_logprobs(pack, temperature)
    for row, sample in enumerate(pack.samples.tolist()):
        expected = groups[sample // 3][sample % 3].logprobs
        torch.testing.assert_close(logprobs[row, : len(expected)], torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_returns_the_logprobs_that_training_on_it_computes() -> None:
    config = LlamaConfig(**(HEADS | {"hidden_size": 128}))  # FlexAttention needs heads of 16 at least
    model = build(config).cuda()
    policy = PackedModel.checked(model)
    assert policy.shares_prompts
    config = GenerationConfig(max_completion_tokens=12)
    engine = Driven(EmbeddedEngine(policy, byte_tokenizer(), config, nullcontext))
    groups = engine.generate(PROMPTS, KEYS, 3)
    rollout = [
        Group(prompt, [completion.token_ids for completion in group], range(3 * i, 3 * i + 3))
        for i, (prompt, group) in enumerate(zip(PROMPTS, groups, strict=True))
    ]
    (pack,) = pack_groups(rollout, 10_000)
    logprobs, _ = policy.token_logprobs(pack.to(model.device), 1.0)
    logprobs.sum().backward()
    for row, sample in enumerate(pack.samples.tolist()):
        expected = torch.tensor(groups[sample // 3][sample % 3].logprobs)
        torch.testing.assert_close(logprobs[row, : len(expected)].detach().cpu(), expected, rtol=1e-2, atol=1e-2)


def test_every_token_is_drawn_as_transformers_own_processors_say() -> None:
    settings_of: list[dict[str, Any]] = [
        {},
        {"top_k": 5, "temperature": 0.8},
        {"top_p": 0.7},
        {"min_p": 0.1, "temperature": 1.3},
        {"repetition_penalty": 1.5, "temperature": 0.7},
        {"repetition_penalty": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.2},
    ]
    model = ragged_llama()
    for options in settings_of:
        groups = engine_of(model, **options).generate(PROMPTS, KEYS, 2)
        processors = LogitsProcessorList()  # in the order in which `generate` applies them
        if "repetition_penalty" in options:
            processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
        processors.append(TemperatureLogitsWarper(options.get("temperature", 1.0)))
        if "top_k" in options:
            processors.append(TopKLogitsWarper(options["top_k"]))
        if "top_p" in options:
            processors.append(TopPLogitsWarper(options["top_p"]))
        if "min_p" in options:
            processors.append(MinPLogitsWarper(options["min_p"]))
        for prompt, key, group in zip(PROMPTS, KEYS, groups, strict=True):
            for index, completion in enumerate(group):
                ids = torch.tensor([[*prompt, *completion.token_ids]])
                with torch.no_grad():
                    logits = model(ids).logits[0]
                for place, uniform in enumerate(sample_uniforms(key, index, 12)[: len(completion.token_ids)]):
                    end = len(prompt) + place
                    scores = processors(ids[:, :end], logits[None, end - 1])
                    cumulative = scores.double().softmax(-1).cumsum(-1)[0]
                    assert completion.token_ids[place] == int((cumulative <= uniform).sum()), options


@pytest.mark.parametrize("options", [{"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}])
def test_the_likeliest_tokens_are_those_of_greedy_generate(options: dict[str, float]) -> None:
    model = ragged_llama()
    groups = engine_of(model, **options).generate(PROMPTS, KEYS, 2)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        output = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=RAGGED_EOS
        )
        expected = output[0, len(prompt) :].tolist()
        assert [completion.token_ids for completion in group] == [expected, expected]


def test_an_end_token_ends_a_completion_and_belongs_to_it() -> None:
    groups = engine_of(ragged_llama()).generate(PROMPTS, KEYS, 8)
    reasons = set()
    for completion in (completion for group in groups for completion in group):
        *before, last = completion.token_ids
        assert not set(before) & set(RAGGED_EOS)
        assert len(completion.logprobs) == len(completion.token_ids)
        if last in RAGGED_EOS:
            assert completion.finish_reason == "stop"
        else:
            assert completion.finish_reason == "length"
            assert len(completion.token_ids) == 12
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_an_end_token_at_the_very_limit_is_a_stop() -> None:
    model = ragged_llama()
    groups = engine_of(model, max_completion_tokens=1).generate(PROMPTS, KEYS, 16)
    completions = [completion for group in groups for completion in group]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert (completion.finish_reason == "stop") == (completion.token_ids[0] in RAGGED_EOS)


def test_text_has_no_special_tokens() -> None:
    groups = engine_of(ragged_llama()).generate(PROMPTS, KEYS, 4)
    tokenizer = byte_tokenizer()
    for completion in (completion for group in groups for completion in group):
        assert completion.text == tokenizer.decode([i for i in completion.token_ids if i < 256])


def ascii_pairs(groups: Sequence[Sequence[Completion]]) -> list[tuple[int, int, str]]:
    """Where two plain characters in a row appear in a completion: (group, sample, pair)."""
    return [
        (i, j, pair)
        for i, group in enumerate(groups)
        for j, completion in enumerate(group)
        for pair in (completion.text[k : k + 2] for k in range(1, len(completion.text) - 2))
        if len(pair) == 2 and pair.isascii() and pair.isprintable()
    ]


def test_a_stop_string_cuts_the_text_and_ends_the_row() -> None:
    model = tiny_llama(eos_token_id=256)
    free = engine_of(model).generate(PROMPTS, KEYS, 4)
    group, sample, pair = ascii_pairs(free)[0]
    model_shapes = record_shapes(model)
    stopped = engine_of(model, stop=[pair, "never in any text"]).generate(PROMPTS, KEYS, 4)
    before, after = free[group][sample], stopped[group][sample]
    assert after.text == before.text[: before.text.index(pair)]
    assert pair not in after.text
    assert after.finish_reason == "stop"
    assert len(after.token_ids) < len(before.token_ids)
    assert after.token_ids == before.token_ids[: len(after.token_ids)]
    decoded = byte_tokenizer().decode(after.token_ids)
    assert decoded.endswith(pair), "the row ends with the token that completes the stop string"
    # Rounding aside: a batch from which a row has left may round its products in another way.
    others = [(a, b) for i, g in enumerate(free) for j, a in enumerate(g) for b in [stopped[i][j]]]
    for free_one, stopped_one in others:
        if pair not in free_one.text:
            assert stopped_one.token_ids == free_one.token_ids, "other completions are as they were"
            assert stopped_one.logprobs == pytest.approx(free_one.logprobs, abs=1e-4)
    assert model_shapes


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    tokenizer, stop = byte_tokenizer(), ["b", "cd", "abc"]
    texts = [decoded(tokenizer, tokenizer.encode(text), stop) for text in ("xxabcd", "xxcdab", "none")]
    assert texts == ["xx", "xx", "none"]


def test_each_prompt_is_computed_once_and_finished_rows_leave() -> None:
    model = ragged_llama()
    engine = engine_of(model)
    shapes = record_shapes(model)
    groups = engine.generate(PROMPTS, KEYS, 6)
    prefill, *decodes = shapes
    assert prefill == (1, sum(map(len, PROMPTS))), "one row of prompts, none of it padding"
    assert all(width == 1 for _, width in decodes)
    rows = [rows for rows, _ in decodes]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > rows[-1]
    lengths = [len(completion.token_ids) for group in groups for completion in group]
    assert rows == [sum(length > step for length in lengths) for step in range(1, len(rows) + 1)]
    assert len(decodes) == max(lengths) - 1, "a last token is never fed"


def test_waiting_groups_take_the_room_of_finished_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, keys = PROMPTS * 2, [(1, index) for index in range(2 * len(PROMPTS))]
    model = ragged_llama()
    engine = engine_of(model)
    at_once = tokens(engine.generate(prompts, keys, 2))
    monkeypatch.setattr(limits, "CACHE_TOKENS", 3 * (7 + 2 * 11))  # three groups
    shapes = record_shapes(model)
    assert tokens(engine.generate(prompts, keys, 2)) == at_once
    decodes = [rows for rows, width in shapes if width == 1]
    prefills = [step for step, (_, width) in enumerate(shapes) if width > 1]
    assert max(decodes) <= 3 * 2
    assert len(prefills) >= 4, "groups come in one by one, not in waves"


def test_groups_are_handed_out_as_they_finish() -> None:
    engine = engine_of(ragged_llama())
    order: list[int] = []
    seen: dict[int, list[Completion]] = {}

    def on_group(index: int, group: list[Completion]) -> None:
        order.append(index)
        seen[index] = group

    groups = engine.generate(PROMPTS, KEYS, 2, on_group=on_group)
    assert [seen[index] for index in range(len(PROMPTS))] == groups
    longest = [max(len(completion.token_ids) for completion in group) for group in groups]
    assert [longest[index] for index in order] == sorted(longest), "the shortest group came first"
    assert order != sorted(order)


def test_what_on_group_raises_ends_the_generation() -> None:
    model = ragged_llama()
    engine = engine_of(model)
    shapes = record_shapes(model)

    def on_group(index: int, group: list[Completion]) -> None:
        raise RuntimeError("a reward failed")

    with pytest.raises(RuntimeError, match="a reward failed"):
        engine.generate(PROMPTS, KEYS, 2, on_group=on_group)
    ended = len(shapes)
    engine.generate(PROMPTS, KEYS, 2)
    assert ended < len(shapes) - ended


def test_lengths_at_which_rotary_embeddings_change_are_refused() -> None:
    scaling = {"rope_type": "longrope", "long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "rope_theta": 1e4}
    config = Phi3Config(**HEADS, original_max_position_embeddings=16, rope_parameters=scaling)
    engine = engine_of(build(config), max_completion_tokens=12)
    engine.generate(PROMPTS[:2], KEYS[:2], 2)
    with pytest.raises(UserError, match=r"a prompt of 7 tokens .* \(12\) exceed 16"):
        engine.generate(PROMPTS[:3], KEYS[:3], 2)


def test_no_prompts_give_no_groups() -> None:
    assert engine_of(tiny_llama()).generate([], [], 2) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored_even_after_a_failure(training: bool) -> None:
    model = tiny_llama().train(training)
    engine = engine_of(model)
    modes: list[bool] = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    engine.generate(PROMPTS[:1], KEYS[:1], 2)
    assert model.training == training
    assert not any(modes)
    handle.remove()

    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    model.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(PROMPTS[:1], KEYS[:1], 2)
    assert model.training == training


def test_the_weights_of_the_moment_are_used_and_adapters_count() -> None:
    plain = tokens(engine_of(ragged_llama()).generate(PROMPTS, KEYS, 3))
    model = get_peft_model(ragged_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    engine = engine_of(model)
    assert tokens(engine.generate(PROMPTS, KEYS, 3)) == plain
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert tokens(engine.generate(PROMPTS, KEYS, 3)) != plain


def test_generation_leaves_no_gradient_and_no_inference_tensor_in_the_weights() -> None:
    model = ragged_llama()
    engine_of(model).generate(PROMPTS, KEYS, 2)
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())
    model(torch.tensor([[1, 2]])).logits.sum().backward()


def test_a_model_that_hides_its_state_is_refused_in_one_message() -> None:
    config = RecurrentGemmaConfig(
        **(SMALL | {"num_hidden_layers": 3}), num_attention_heads=4, lru_width=32, intermediate_size=48
    )
    with pytest.raises(UserError, match=r"generation\.engine: .* RecurrentGemmaForCausalLM"):
        engine_of(build(config)).generate(PROMPTS[:2], KEYS[:2], 2)


def test_every_token_that_ends_a_completion_is_known() -> None:
    tokenizer = byte_tokenizer()
    assert eos_token_ids(tiny_llama(eos_token_id=[3, 4]), tokenizer) == {3, 4, tokenizer.eos_token_id}
    assert eos_token_ids(tiny_llama(eos_token_id=None), tokenizer) == {tokenizer.eos_token_id}


def draw(logits: torch.Tensor, uniforms: Sequence[float], **options: Any) -> list[int]:
    """One token for each uniform from the same (V,) logits."""
    config = GenerationConfig(**options)
    rows = torch.tensor(uniforms, dtype=torch.float64)
    history = torch.zeros(len(uniforms), 1, dtype=torch.long)
    drawn, logprobs = sample_tokens(
        logits.expand(len(uniforms), -1), rows, config.temperature, logits_processors(config), history
    )
    expected = (logits.float() / config.temperature).log_softmax(-1)[drawn]
    torch.testing.assert_close(logprobs, expected)
    return drawn.tolist()


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    probabilities = torch.tensor([0.5, 0.02, 0.18, 0.0, 0.3])
    uniforms = np.random.default_rng(5).random(20_000)
    counts = np.bincount(draw(probabilities.log(), uniforms.tolist()), minlength=5)
    expected = probabilities.double().numpy() * 20_000
    assert counts[3] == 0
    present = expected > 0
    chi_square = ((counts - expected)[present] ** 2 / expected[present]).sum()
    assert chi_square < 16.27, "the 99.9 % quantile with 3 degrees of freedom"
    evenly = np.bincount(draw(probabilities.log(), ((np.arange(1000) + 0.5) / 1000).tolist()), minlength=5)
    assert np.abs(evenly - probabilities.numpy() * 1000).max() <= 1


@pytest.mark.parametrize("broken", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_what_is_no_distribution_has_no_finite_log_probability(
    broken: list[float], options: dict[str, Any]
) -> None:
    logits = torch.tensor([broken, [0.0, 1.0, -math.inf]])
    uniforms, history = torch.tensor([0.5, 0.999], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.long)
    processors = logits_processors(GenerationConfig(**options))
    tokens, logprobs = sample_tokens(logits, uniforms, 1.0, processors, history)
    assert logprobs.isfinite().tolist() == [False, True]
    assert 0 <= tokens[0] < 3
    assert tokens[1] == 1


def test_temperature_sharpens_what_is_drawn() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    evenly = ((np.arange(3000) + 0.5) / 3000).tolist()
    counts = np.bincount(draw(logits, evenly, temperature=0.5), minlength=3)
    assert np.abs(counts - (logits / 0.5).softmax(-1).numpy() * 3000).max() <= 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.just(-math.inf), st.floats(-60, 60)), min_size=1, max_size=30).filter(
        lambda values: any(math.isfinite(value) for value in values)
    ),
    st.one_of(st.sampled_from([0.0, JUST_BELOW_1, 0.5]), st.floats(0, JUST_BELOW_1)),
)
def test_a_token_of_zero_probability_is_never_drawn(values: list[float], uniform: float) -> None:
    (token,) = draw(torch.tensor(values), [uniform])
    assert math.isfinite(values[token])


def test_the_first_and_last_possible_tokens_are_at_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([-math.inf, 0.3, -math.inf, 1.0, 0.1, -math.inf])
    assert draw(logits, [0.0, JUST_BELOW_1]) == [1, 4]


@pytest.mark.parametrize(
    ("options", "processor"),
    [
        ({"top_k": 3}, TopKLogitsWarper(3)),
        ({"top_p": 0.6}, TopPLogitsWarper(0.6)),
        ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
    ],
)
def test_the_tokens_that_can_be_drawn_are_those_that_the_processor_leaves(
    options: dict[str, float], processor: Any
) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        logits = 2 * torch.randn(12, generator=generator)
        left = processor(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].isfinite().nonzero().squeeze(1)
        evenly = [0.0, JUST_BELOW_1, *((np.arange(2000) + 0.5) / 2000).tolist()]
        assert set(draw(logits, evenly, **options)) == set(left.tolist())


def test_uniforms_are_named_by_key_and_sample_and_begin_alike_at_any_length() -> None:
    longer, shorter = sample_uniforms((1, 2), 3, 20), sample_uniforms((1, 2), 3, 5)
    assert longer[:5].tolist() == shorter.tolist()
    assert ((longer >= 0) & (longer < 1)).all()
    for other in (sample_uniforms((1, 2), 4, 5), sample_uniforms((1, 3), 3, 5), sample_uniforms((2, 2), 3, 5)):
        assert other.tolist() != shorter.tolist()
