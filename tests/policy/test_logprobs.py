"""A pack gives the log-probabilities, entropies and gradients of plain rows, wherever prompts are shared."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RwkvConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_cli.algorithm.packing import Group, pack_groups
from grpo_cli.policy import attention
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.model import without_dropout
from grpo_cli.policy.output_head import LogitForm, OutputHead
from tests.conftest import tiny_llama
from tests.trees import sampled_of

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}
HEADS: dict[str, Any] = BASE | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
GPT2: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT2 |= {"bos_token_id": None, "eos_token_id": 3}

SHARING: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**HEADS),
    "qwen2": lambda: Qwen2Config(**HEADS),
    "qwen3": lambda: Qwen3Config(**HEADS, head_dim=8),
    "gemma": lambda: GemmaConfig(**HEADS, head_dim=8),
    "gpt2": lambda: GPT2Config(**GPT2),
    "phi": lambda: PhiConfig(**HEADS),
    "mistral with a sliding window": lambda: MistralConfig(**HEADS, sliding_window=4),
    "qwen2 with a sliding window in one layer": lambda: Qwen2Config(
        **HEADS, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "gemma3 with a window of its own in most layers": lambda: Gemma3TextConfig(
        **HEADS, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
}
"""Attention, over everything or over a window: prompts are shared."""

NOT_SHARING: dict[str, Callable[[], Any]] = {
    "gemma2, which caps its attention scores": lambda: Gemma2Config(**HEADS, head_dim=8),
    "gpt-neo": lambda: GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=64,
        bos_token_id=None,
        eos_token_id=3,
    ),
    "mamba": lambda: MambaConfig(**BASE, state_size=4),
    "jamba": lambda: JambaConfig(
        **HEADS, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4
    ),
    "lfm2": lambda: Lfm2Config(**HEADS, layer_types=["conv", "full_attention"]),
    "rwkv": lambda: RwkvConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, bos_token_id=0
    ),
}
"""Layers that a shared prompt would change, or that our kernel does not compute: rows are plain."""


def tokens(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]


def ragged() -> list[Group]:
    """Ragged completions, empty ones, one of a single token, prompts of one token."""
    return [
        Group(tokens(5)[0], tokens(4, 0, 7, 1), [0, 1, 2, 3]),
        Group(tokens(1)[0], tokens(3, 6), [4, 5]),
        Group(tokens(9)[0], tokens(0, 0), [6, 7]),
        Group(tokens(2)[0], tokens(1), [8]),
    ]


def build(config: Any, *, spread: float = 0.2, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
    return model.eval()


def outputs(
    policy: PackedModel, groups: list[Group], budget: int, *, shared_prompt: bool, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(N, T) log-probabilities and entropies, and every parameter's gradient of a weighted sum of them."""
    count = sum(len(group.samples) for group in groups)
    width = max(len(completion) for group in groups for completion in group.completions)
    weights = torch.randn(2, count, width, generator=torch.Generator().manual_seed(7))
    all_logprobs, all_entropies = torch.zeros(count, width), torch.zeros(count, width)
    model = policy.model
    model.zero_grad(set_to_none=False)
    for pack in pack_groups(groups, budget, shared_prompt=shared_prompt):
        logprobs, entropies = policy.token_logprobs(pack, 0.7, entropy_gradient=entropy_gradient)
        assert logprobs.shape == entropies.shape == pack.mask.shape
        assert logprobs.dtype == entropies.dtype == torch.float32
        assert (logprobs[~pack.mask] == 0).all()
        assert (entropies[~pack.mask] == 0).all()
        share = weights[:, pack.samples, : pack.mask.shape[1]]
        loss = (share[0] * logprobs).sum() + (share[1] * entropies).sum()
        if loss.requires_grad:
            loss.backward()
        all_logprobs[pack.samples, : pack.mask.shape[1]] = logprobs.detach()
        all_entropies[pack.samples, : pack.mask.shape[1]] = entropies.detach()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    return all_logprobs, all_entropies, gradients


def one_by_one(
    model: Any, groups: list[Group], *, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The same from a plain forward of each unpadded sequence, without any code of ours."""
    count = sum(len(group.samples) for group in groups)
    width = max(len(completion) for group in groups for completion in group.completions)
    weights = torch.randn(2, count, width, generator=torch.Generator().manual_seed(7))
    all_logprobs, all_entropies = torch.zeros(count, width), torch.zeros(count, width)
    model.zero_grad(set_to_none=False)
    for group in groups:
        rows = zip(group.samples, group.contexts, group.completions, sampled_of(group), strict=True)
        for sample, context, completion, sampled in rows:
            if not completion:
                continue
            ids = torch.tensor([[*context, *completion]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
            distribution = (logits.float() / 0.7).log_softmax(-1)  # (T, V)
            logprobs = distribution[torch.arange(len(completion)), torch.tensor(completion)]
            logprobs = logprobs * torch.tensor(sampled)
            entropies = -(distribution.exp() * distribution).sum(-1) * torch.tensor(sampled)
            share = weights[:, sample, : len(completion)]
            loss = (share[0] * logprobs).sum()
            if entropy_gradient:
                loss = loss + (share[1] * entropies).sum()
            loss.backward()
            all_logprobs[sample, : len(completion)] = logprobs.detach()
            all_entropies[sample, : len(completion)] = entropies.detach()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    return all_logprobs, all_entropies, gradients


def assert_same(
    actual: tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]],
    expected: tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=2e-5)
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        floor = 1e-5 * max(gradient.abs().max().item(), 1e-2)
        torch.testing.assert_close(
            actual[2][name], gradient, rtol=1e-5, atol=floor, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_packs_of_any_budget_equal_plain_forwards_gradients_included(name: str, entropy_gradient: bool) -> None:
    model = build(SHARING[name]())
    expected = one_by_one(model, ragged(), entropy_gradient=entropy_gradient)
    policy = PackedModel.checked(model)
    assert policy.shares_prompts
    assert policy.logit_form is not None
    for shared_prompt, budget in ((True, 1), (True, 9), (True, 17), (True, 1000), (False, 1), (False, 1000)):
        actual = outputs(policy, ragged(), budget, shared_prompt=shared_prompt, entropy_gradient=entropy_gradient)
        assert_same(actual, expected)


@pytest.mark.parametrize("name", SHARING)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model = build(SHARING[name]())
    without_dropout(model)
    expected = one_by_one(model, ragged())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same(outputs(PackedModel.checked(model), ragged(), 1000, shared_prompt=True), expected)


@pytest.mark.parametrize("spread", [0.02, 0.2])
@pytest.mark.parametrize("name", NOT_SHARING)
def test_layers_that_a_shared_prompt_would_change_are_found_out(name: str, spread: float) -> None:
    assert not PackedModel.checked(build(NOT_SHARING[name](), spread=spread)).shares_prompts


@pytest.mark.parametrize("name", NOT_SHARING)
def test_plain_rows_equal_plain_forwards_where_prompts_cannot_be_shared(name: str) -> None:
    model = build(NOT_SHARING[name]())
    expected = one_by_one(model, ragged(), entropy_gradient=True)
    policy = PackedModel.checked(model)
    for budget in (1, 30, 1000):
        assert_same(outputs(policy, ragged(), budget, shared_prompt=False, entropy_gradient=True), expected)


def test_a_window_that_a_layer_keeps_to_itself_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check is shorter than most windows, so the layers must say that they have one."""
    model = build(MistralConfig(**HEADS, sliding_window=64))
    assert PackedModel.checked(model).shares_prompts
    model = build(MistralConfig(**HEADS, sliding_window=64))
    kernel = attention.shared_prompt_attention

    def forgetful(*arguments: Any, sliding_window: int, **kwargs: Any) -> Any:
        return kernel(*arguments, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.KERNEL, forgetful)
    assert not PackedModel.checked(model).shares_prompts


def thrice_the_logits(_: Any, arguments: Any, output: Any) -> Any:
    output.logits = 3 * output.logits
    return output


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_output_head_that_is_no_plain_matrix_gives_whole_logits(wrapped: bool) -> None:
    model = build(SHARING["llama"]())
    if not wrapped:
        model.register_forward_hook(thrice_the_logits)
    expected = one_by_one(model, ragged(), entropy_gradient=True)
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    policy = PackedModel.checked(model)
    assert policy.logit_form is None
    actual = outputs(policy, ragged(), 1000, shared_prompt=True, entropy_gradient=True)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=2e-5)


def test_a_head_that_gives_other_values_than_the_model_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SHARING["llama"]())
    right = OutputHead.of(model, LogitForm())
    assert right is not None
    monkeypatch.setattr(OutputHead, "of", lambda *_: OutputHead(right.weight, right.bias, scale=1.5))
    assert PackedModel.checked(model).logit_form is None


def test_a_model_that_gives_all_logits_when_asked_for_some_is_read_rightly() -> None:
    model = build(SHARING["llama"]())
    expected = one_by_one(model, ragged())
    policy = PackedModel.checked(model)
    policy.logit_form = None
    forward = model.forward

    def all_logits(*, logits_to_keep: torch.Tensor, **arguments: Any) -> Any:
        return forward(**arguments)

    model.forward = all_logits
    for shared_prompt in (True, False):
        assert_same(outputs(policy, ragged(), 1000, shared_prompt=shared_prompt), expected)


def test_entropies_carry_a_gradient_only_when_asked_to() -> None:
    policy = PackedModel.checked(tiny_llama())
    (pack,) = pack_groups([Group([1, 2], [[3, 4]], [0])], 100)
    assert not policy.token_logprobs(pack, 1.0)[1].requires_grad
    assert policy.token_logprobs(pack, 1.0, entropy_gradient=True)[1].requires_grad
    with torch.no_grad():
        assert not any(t.requires_grad for t in policy.token_logprobs(pack, 1.0, entropy_gradient=True))


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_a_pack_of_empty_completions_gives_empty_rows(shared_prompt: bool) -> None:
    (pack,) = pack_groups([Group([1, 2], [[], []], [0, 1])], 100, shared_prompt=shared_prompt)
    logprobs, entropies = PackedModel.checked(tiny_llama()).token_logprobs(pack, 1.0)
    assert logprobs.shape == entropies.shape == (2, 0)


def test_a_kernel_that_was_asked_for_is_kept_and_rows_are_plain() -> None:
    model = build(SHARING["llama"](), attention="eager")
    policy = PackedModel.checked(model)
    assert not policy.shares_prompts
    assert model.config._attn_implementation == "eager"


def test_a_model_that_failed_the_check_keeps_its_kernel() -> None:
    model = build(NOT_SHARING["lfm2"]())
    PackedModel.checked(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_can_be_looked_at_twice() -> None:
    model = build(SHARING["llama"]())
    assert PackedModel.checked(model).shares_prompts
    assert PackedModel.checked(model).shares_prompts


def test_a_model_that_drops_the_layout_gives_itself_away() -> None:
    model = build(SHARING["llama"]())
    forward = model.model.forward

    def without_layout(**arguments: Any) -> Any:
        if arguments.pop(attention.LAYOUT, None) is not None:
            arguments["attention_mask"] = None
        return forward(**arguments)

    model.model.forward = without_layout
    assert not PackedModel.checked(model).shares_prompts


def test_a_model_that_ignores_position_ids_gives_itself_away() -> None:
    model = build(SHARING["gpt2"]())
    forward = model.transformer.forward

    def without_positions(*ids: torch.Tensor, position_ids: torch.Tensor, **arguments: Any) -> Any:
        return forward(*ids, **arguments)

    model.transformer.forward = without_positions
    assert not PackedModel.checked(model).shares_prompts


@pytest.mark.parametrize("training", [True, False])
def test_the_self_check_is_made_without_dropout_and_leaves_the_mode_alone(training: bool) -> None:
    model = build(GPT2Config(**GPT2, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)).train(training)
    assert PackedModel.checked(model).shares_prompts
    assert model.training == training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_self_check_allows_for_the_rounding_of_each_precision(dtype: torch.dtype) -> None:
    policy = PackedModel.checked(build(SHARING["llama"]()).to(dtype))
    assert policy.shares_prompts
    assert policy.logit_form is not None


def test_precision_of_a_forward_is_that_of_autocast_where_there_is_one() -> None:
    policy = PackedModel.checked(tiny_llama())
    assert policy.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert policy.dtype == torch.bfloat16
        assert PackedModel.checked(policy.model).shares_prompts
    policy.model.to(torch.bfloat16)
    assert policy.dtype == torch.bfloat16
