"""Structure decides whether a model shares prompts, never the noise of a precision; and the reason is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, Lfm2Config, LlamaConfig, Qwen2Config

from grpo_cli.algorithm.packing import pack_groups
from grpo_cli.policy import attention, self_check
from grpo_cli.policy.attention import LayerInputs, RowLayout
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.output_head import LogitForm
from grpo_cli.policy.self_check import self_check_groups, why_not_shared
from tests.policy.test_logprobs import GPT2, HEADS, build

DEEP: dict[str, Any] = HEADS | {"num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 128}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def noisy(name: str) -> Any:
    """A model so deep and of such weights that bfloat16 moves log-probabilities by more than 0.15 nats."""
    return build(CONFIGS[name](**DEEP), spread=0.3)


def noise(policy: PackedModel, seed: int) -> float:
    """Nats between packed and plain rows in the precision that is on."""
    groups, _ = self_check_groups(policy.config.vocab_size, seed)
    rows = []
    for shared_prompt in (True, False):
        (pack,) = pack_groups(groups, 64, shared_prompt=shared_prompt)
        rows.append(policy.token_logprobs(pack, 1.0)[0][pack.samples.argsort()])
    return (rows[0] - rows[1]).abs().max().item()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_seed_of_tokens_passes_however_noisy_bfloat16_is(name: str, weights: torch.dtype) -> None:
    model = noisy(name).to(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        policy = PackedModel.checked(model)
        assert policy.logit_form is not None
        assert [why_not_shared(policy, seed) for seed in range(8)] == [None] * 8
        for seed in range(8):
            self_check.find_logit_form(policy, seed)
            assert policy.logit_form == LogitForm()
        assert max(noise(policy, seed) for seed in range(8)) > 0.15, "the noise is there"


@pytest.mark.parametrize("seed", range(8))
def test_wrong_positions_are_found_out_under_the_same_noise(seed: int) -> None:
    model = build(GPT2Config(**GPT2 | {"n_layer": 8}))
    forward = model.transformer.forward

    def without_positions(*ids: torch.Tensor, position_ids: torch.Tensor, **arguments: Any) -> Any:
        return forward(*ids, **arguments)

    model.transformer.forward = without_positions
    for weights in (torch.float32, torch.bfloat16):
        model.to(weights)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
            assert "nats from those of plain rows" in str(why_not_shared(PackedModel.checked(model), seed))


def test_half_weights_are_lifted_where_they_are_used_and_stay_what_they_are() -> None:
    model = noisy("llama").to(torch.bfloat16)
    with torch.no_grad():
        assert why_not_shared(PackedModel.checked(model)) is None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_no_number_fails_every_check() -> None:
    model = build(LlamaConfig(**HEADS))
    model.model.layers[1].mlp.down_proj.weight.data[:] = torch.nan
    policy = PackedModel.checked(model)
    assert policy.why_not_shared is not None
    assert policy.logit_form is None


@pytest.mark.parametrize(
    ("config", "asked", "reason"),
    [
        (LlamaConfig(**HEADS), "eager", "its attention kernel is eager; model.attn_implementation: only auto"),
        (Lfm2Config(**HEADS, layer_types=["conv", "full_attention"]), None, "its layers are of kind conv"),
        (Gemma2Config(**HEADS, head_dim=8), None, "ValueError: shared-prompt attention has no softcap"),
    ],
    ids=["kernel", "layers", "scores"],
)
def test_the_reason_is_what_is_in_the_way(config: Any, asked: str | None, reason: str) -> None:
    assert reason in str(PackedModel.checked(build(config, attention=asked)).why_not_shared)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler.\nSet CC"), "RuntimeError: Failed to find C compiler. Set CC"),
        (torch.OutOfMemoryError("CUDA out of memory. " + "x" * 900), "OutOfMemoryError: CUDA out of memory. xx"),
    ],
)
def test_an_exception_of_the_kernel_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*arguments: Any) -> Any:
        raise error

    model = build(LlamaConfig(**HEADS))
    monkeypatch.setattr(RowLayout, "attend", fail)
    policy = PackedModel.checked(model)
    assert str(policy.why_not_shared).startswith(reason)
    assert len(str(policy.why_not_shared)) <= self_check.LONGEST_REASON
    assert model.config._attn_implementation == "sdpa"


def test_a_kernel_that_is_wrong_on_this_device_is_found_out_at_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowLayout.attend

    def wrong(layout: RowLayout, inputs: LayerInputs) -> torch.Tensor:
        attended = right(layout, inputs)
        return attended * 1.5 if inputs.layer == 1 else attended

    monkeypatch.setattr(RowLayout, "attend", wrong)
    assert "of the values in layer 1 (float32)" in str(
        PackedModel.checked(build(LlamaConfig(**HEADS))).why_not_shared
    )


def test_a_kernel_that_lets_completions_see_each_other_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowLayout.attend

    def leaking(layout: RowLayout, inputs: LayerInputs) -> torch.Tensor:
        return right(layout, inputs) + 0.01 * inputs.value.mean(2, keepdim=True).repeat_interleave(2, 1)

    monkeypatch.setattr(RowLayout, "attend", leaking)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reason = PackedModel.checked(build(LlamaConfig(**HEADS))).why_not_shared
    assert reason == "the attention kernel lets completions see each other in layer 0 (bfloat16)"


def test_a_kernel_whose_values_are_not_finite_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowLayout, "attend", lambda _, inputs: inputs.query * torch.nan)
    assert (
        PackedModel.checked(build(LlamaConfig(**HEADS))).why_not_shared
        == "its log-probabilities are not finite in float32"
    )


def test_a_kernel_whose_gradients_are_not_finite_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowLayout.attend
    # The root of 0 is 0, and its derivative infinite.
    monkeypatch.setattr(
        RowLayout, "attend", lambda layout, inputs: right(layout, inputs) + (0 * inputs.query.abs()).sqrt()
    )
    reason = PackedModel.checked(build(LlamaConfig(**HEADS))).why_not_shared
    assert reason == "the gradients of a shared-prompt row are not finite"


def test_a_model_told_to_take_plain_rows_has_sdpa_again() -> None:
    policy = PackedModel.checked(build(LlamaConfig(**HEADS)))
    assert policy.config._attn_implementation == attention.KERNEL
    policy.take_plain_rows("the reference: no")
    assert not policy.shares_prompts
    assert policy.config._attn_implementation == "sdpa"
