"""Chunked log-probabilities and entropies equal those of whole logits, gradients included, in a chunk's memory."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MiniCPM3Config,
    MptConfig,
    NanoChatConfig,
    PhiConfig,
    RecurrentGemmaConfig,
    SiglipVisionConfig,
)

from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.output_head import LogitForm, OutputHead, chosen_logprobs
from grpo_cli.recipe import limits
from tests.conftest import tiny_llama

TOKENS, WORDS, WIDTH = 7, 11, 5


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def words(count: int, vocabulary: int = WORDS) -> torch.Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(count))


def whole(
    hidden: torch.Tensor, head: OutputHead, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by ordinary autograd through all logits."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.scale
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    distribution = (logits / temperature).log_softmax(-1)
    chosen = distribution.gather(1, targets[:, None]).squeeze(1)
    return chosen, -(distribution.exp() * distribution).sum(-1)


def differentiated(
    values: tuple[torch.Tensor, torch.Tensor], inputs: list[torch.Tensor], *, entropy_gradient: bool
) -> list[torch.Tensor]:
    """Values, and the gradients of a weighted sum of them."""
    logprobs, entropies = values
    loss = (numbers(len(logprobs), seed=3).to(logprobs) * logprobs).sum()
    if entropy_gradient:
        loss = loss + (numbers(len(logprobs), seed=4).to(logprobs) * entropies).sum()
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [logprobs.detach(), entropies.detach(), *torch.autograd.grad(loss, wanted)]


def assert_as_whole(
    hidden: torch.Tensor,
    head: OutputHead,
    *,
    temperature: float = 0.7,
    entropy_gradient: bool = True,
    chunk_tokens: int | None = None,
    rtol: float = 1e-9,
    atol: float = 1e-11,
) -> None:
    targets = words(len(hidden), len(head.weight))
    inputs = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    actual = chosen_logprobs(
        hidden, head, targets, temperature, entropy_gradient=entropy_gradient, chunk_tokens=chunk_tokens
    )
    assert actual[1].requires_grad == entropy_gradient
    actual_all = differentiated(actual, inputs, entropy_gradient=entropy_gradient)
    expected = differentiated(whole(hidden, head, targets, temperature), inputs, entropy_gradient=entropy_gradient)
    for one, other in zip(actual_all, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@contextmanager
def small_blocks(rows: int, vocabulary: int = WORDS) -> Iterator[None]:
    """Softmax and its like over `rows` tokens at a time, so that a chunk has several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(limits.HEAD_BLOCK_BYTES, "cpu", 4 * vocabulary * rows)
        yield


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden weight", "hidden weight bias"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (0.25, 0.6), (3.0, 1.3)])
@pytest.mark.parametrize("chunk_tokens", [1, 3, TOKENS, TOKENS + 5, None])
def test_values_and_gradients_are_those_of_whole_logits(
    trained: str,
    entropy_gradient: bool,
    softcap: float | None,
    scale: float,
    temperature: float,
    chunk_tokens: int | None,
) -> None:
    def leaf(name: str, *shape: int) -> torch.Tensor:
        return numbers(*shape, seed=len(name)).requires_grad_(name in trained.split())

    head = OutputHead(leaf("weight", WORDS, WIDTH), leaf("bias", WORDS), scale, softcap)
    hidden = leaf("hidden", TOKENS, WIDTH)
    with small_blocks(2):
        assert_as_whole(
            hidden, head, temperature=temperature, entropy_gradient=entropy_gradient, chunk_tokens=chunk_tokens
        )


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 12),
    width=st.integers(1, 6),
    chunk_tokens=st.integers(1, 11),
    rows=st.integers(1, 4),
    frozen=st.booleans(),
    entropy_gradient=st.booleans(),
)
def test_any_shape_in_any_cut_gives_the_same(
    tokens: int, vocabulary: int, width: int, chunk_tokens: int, rows: int, frozen: bool, entropy_gradient: bool
) -> None:
    hidden = numbers(tokens, width).requires_grad_()
    head = OutputHead(numbers(vocabulary, width, seed=1).requires_grad_(not frozen), None)
    with small_blocks(rows, vocabulary):
        assert_as_whole(hidden, head, entropy_gradient=entropy_gradient, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_numerical_differentiation_agrees(frozen: bool, softcap: float | None) -> None:
    targets = words(4)

    def values(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = OutputHead(weight, bias, 0.8, softcap)
        return chosen_logprobs(hidden, head, targets, 0.9, entropy_gradient=True, chunk_tokens=3)

    inputs = [numbers(4, 3), numbers(WORDS, 3, seed=1), numbers(WORDS, seed=2)]
    for tensor in inputs[:1] if frozen else inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(values, inputs)


def test_float32_is_as_exact_as_whole_logits() -> None:
    hidden = numbers(40, 16, dtype=torch.float32).requires_grad_()
    head = OutputHead(numbers(300, 16, seed=1, dtype=torch.float32).requires_grad_(), None, 0.5)
    assert_as_whole(hidden, head, chunk_tokens=9, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_close_to_float32_and_gradients_keep_their_inputs_precision(
    autocast: bool, frozen: bool
) -> None:
    exact = numbers(64, 16).requires_grad_(), (numbers(200, 16, seed=1) / 4).requires_grad_(not frozen)
    dtype = torch.float32 if autocast else torch.bfloat16
    rough = [tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for tensor in exact]
    targets = words(64, 200)
    results = []
    for hidden, weight in (exact, rough):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            head = OutputHead(weight, None)
            values = chosen_logprobs(hidden, head, targets, 1.0, entropy_gradient=True, chunk_tokens=10)
            results.append(differentiated(values, [hidden, weight], entropy_gradient=True))
    expected, actual = results
    assert [tensor.dtype for tensor in actual] == [torch.float32] * 2 + [dtype] * (1 if frozen else 2)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < 0.02 * other.abs().max()


def test_a_bfloat16_weights_gradient_is_summed_over_chunks_in_float32() -> None:
    hidden = numbers(512, 4, dtype=torch.bfloat16)
    targets = words(512, 9)
    errors = {}
    for chunk_tokens in (1, 512):
        weight = numbers(9, 4, seed=1, dtype=torch.bfloat16).requires_grad_()
        chosen_logprobs(hidden, OutputHead(weight, None), targets, 1.0, chunk_tokens=chunk_tokens)[
            0
        ].sum().backward()
        exact = weight.detach().double().requires_grad_()
        whole(hidden.double(), OutputHead(exact, None), targets, 1.0)[0].sum().backward()
        errors[chunk_tokens] = (weight.grad - exact.grad).norm() / exact.grad.norm()
    assert errors[1] < 0.01 > errors[512]  # a sum in bfloat16 is off by more than 0.03


def test_a_head_tied_to_the_embeddings_gets_both_gradients() -> None:
    results = []
    ids, targets = words(6), words(5).repeat(2)[:6]
    for function in (chosen_logprobs, whole):
        table = numbers(WORDS, WIDTH).requires_grad_()
        logprobs, _ = function(table[ids].tanh(), OutputHead(table, None), targets, 0.8)
        logprobs.square().sum().backward()
        results.append(table.grad)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_tokens_give_empty_results_and_zero_gradients(frozen: bool) -> None:
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    head = OutputHead(torch.ones(WORDS, WIDTH, requires_grad=not frozen), None)
    logprobs, entropies = chosen_logprobs(hidden, head, words(0), 1.0, entropy_gradient=True)
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    assert hidden.grad.shape == (0, WIDTH)
    assert frozen or not head.weight.grad.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_hidden_states_and_gradients_of_any_layout_are_taken(frozen: bool) -> None:
    head = OutputHead(numbers(WIDTH, WORDS, seed=1).t().detach().requires_grad_(not frozen), None)
    hidden = numbers(WIDTH, 2 * TOKENS).requires_grad_()
    for states in (hidden.t(), hidden.t()[::2], hidden[:, :1].t().expand(TOKENS, WIDTH)):
        assert_as_whole(states, head, chunk_tokens=3)
    logprobs, _ = chosen_logprobs(hidden.t(), head, words(2 * TOKENS), 1.0)
    logprobs.sum().backward()  # an expanded gradient
    assert hidden.grad.isfinite().all()


def test_large_logits_and_impossible_targets_stay_finite() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    head = OutputHead(torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True), None)
    logprobs, entropies = chosen_logprobs(hidden, head, torch.tensor([1, 1]), 1.0, entropy_gradient=True)
    assert logprobs.tolist() == [-2000.0, 0.0]
    assert entropies.tolist() == [0.0, 0.0]
    (logprobs.sum() + entropies.sum()).backward()
    assert hidden.grad.tolist() == [[-2.0], [0.0]]
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("frozen", [False, True])
def test_entropies_carry_a_gradient_only_when_asked_to(frozen: bool) -> None:
    head = OutputHead(numbers(WORDS, WIDTH, seed=1).requires_grad_(not frozen), None)
    hidden = numbers(TOKENS, WIDTH).requires_grad_()
    logprobs, entropies = chosen_logprobs(hidden, head, words(TOKENS), 1.0)
    assert logprobs.requires_grad
    assert not entropies.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            values = chosen_logprobs(hidden, head, words(TOKENS), 1.0, entropy_gradient=True)
        assert not any(value.requires_grad for value in values)
        torch.testing.assert_close(values[0], logprobs.detach())


@pytest.mark.parametrize("frozen", [False, True])
def test_the_backward_pass_can_be_made_twice(frozen: bool) -> None:
    head = OutputHead(numbers(WORDS, WIDTH, seed=1).requires_grad_(not frozen), None)
    hidden = numbers(TOKENS, WIDTH).requires_grad_()
    logprobs, _ = chosen_logprobs(hidden, head, words(TOKENS), 1.0, chunk_tokens=4)
    first, second = (torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_deterministic_algorithms_are_enough_and_give_the_same_bits() -> None:
    head = OutputHead(numbers(WORDS, WIDTH, seed=1).requires_grad_(), numbers(WORDS).requires_grad_(), 1.0, 2.0)
    hidden = numbers(TOKENS, WIDTH).requires_grad_()

    def run() -> list[torch.Tensor]:
        values = chosen_logprobs(hidden, head, words(TOKENS), 1.0, entropy_gradient=True, chunk_tokens=3)
        return differentiated(values, [hidden, head.weight, head.bias], entropy_gradient=True)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(before)


class Watch(TorchDispatchMode):
    """The largest tensor that any operation returns, how many large ones live at a time, and the products."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.largest, self.alive, self.most, self.products = large, 0, 0, 0, 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
        )
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage.nbytes() >= 4 * self.large and storage.data_ptr() not in self.seen:
                    self.seen[storage.data_ptr()] = 1
                    self.alive += 1
                    self.most = max(self.most, self.alive)
                    weakref.finalize(storage, self.forget, storage.data_ptr())
        return result

    def forget(self, address: int) -> None:
        self.seen.pop(address)
        self.alive -= 1


@pytest.mark.parametrize("mode", ["trained", "frozen", "no gradient"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_is_larger_than_one_chunk_of_logits(mode: str, entropy_gradient: bool, autocast: bool) -> None:
    tokens, vocabulary, width, chunk = 64, 997, 2, 8
    hidden = numbers(tokens, width, dtype=torch.float32).requires_grad_(mode != "no gradient")
    weight = numbers(vocabulary, width, seed=1, dtype=torch.float32).requires_grad_(mode == "trained")
    head, targets = OutputHead(weight, None, 0.5, 3.0), words(tokens, vocabulary)
    gc.collect()
    with small_blocks(2, vocabulary), Watch(chunk * vocabulary // 2) as watch:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            values = chosen_logprobs(
                hidden, head, targets, 0.7, entropy_gradient=entropy_gradient, chunk_tokens=chunk
            )
        if mode != "no gradient":
            differentiated(values, [hidden, weight], entropy_gradient=entropy_gradient)
    assert watch.largest == max(chunk * vocabulary, vocabulary * width)
    # A chunk in bfloat16 counts as large already.
    assert watch.most == (2 if mode == "frozen" and entropy_gradient else 1)


@pytest.mark.parametrize(
    ("trained", "chunks", "entropy_gradient", "products"),
    [
        (True, 1, False, 1 + 2),
        (True, 1, True, 1 + 2),
        (True, 4, False, 4 + 3 + 8),  # all but the last chunk's logits a second time
        (False, 1, False, 1 + 1),
        (False, 4, False, 4 + 4),
        (False, 4, True, 4 + 8),
    ],
)
def test_nothing_is_multiplied_twice_in_one_chunk_or_with_a_frozen_head(
    trained: bool, chunks: int, entropy_gradient: bool, products: int
) -> None:
    hidden = numbers(8, WIDTH).requires_grad_()
    head = OutputHead(numbers(WORDS, WIDTH, seed=1).requires_grad_(trained), None)
    with Watch(1000) as watch:
        values = chosen_logprobs(
            hidden, head, words(8), 1.0, entropy_gradient=entropy_gradient, chunk_tokens=8 // chunks
        )
        differentiated(values, [hidden, head.weight], entropy_gradient=entropy_gradient)
    assert watch.products == products


@pytest.mark.parametrize("frozen", [False, True])
def test_default_chunks_hold_the_budget_and_at_least_one_token(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = OutputHead(numbers(WORDS, WIDTH, seed=1).requires_grad_(not frozen), None)
    hidden = numbers(TOKENS, WIDTH).requires_grad_()
    for budget, rows in ((4 * WORDS * 4, 2 if frozen else 4), (1, 1)):
        monkeypatch.setitem(limits.HEAD_CHUNK_BYTES, "cpu", budget)
        with Watch(1000) as watch:
            chosen_logprobs(hidden, head, words(TOKENS), 1.0, entropy_gradient=True)
        assert watch.largest <= max(rows * WORDS, WORDS * WIDTH)
        assert_as_whole(hidden, head)


TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**TINY),
    "llama, tied": lambda: LlamaConfig(**TINY, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=2.0),
    "gemma2 without a cap": lambda: Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=None),
    "nanochat": lambda: NanoChatConfig(**TINY, final_logit_softcapping=2.0),
    "recurrent gemma": lambda: RecurrentGemmaConfig(**TINY, lru_width=32, logits_soft_cap=2.0),
    "cohere": lambda: CohereConfig(**TINY, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**TINY, logits_scaling=5.0),
    "hyperclovax": lambda: HyperCLOVAXConfig(**TINY, logits_scaling=5.0),
    "minicpm3": lambda: MiniCPM3Config(
        **TINY | {"num_key_value_heads": 4}, dim_model_base=8, q_lora_rank=16, kv_lora_rank=16
    ),
    "falcon-h1": lambda: FalconH1Config(
        **TINY, lm_head_multiplier=0.4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "mpt, whose scale is ignored": lambda: MptConfig(
        vocab_size=97, d_model=32, n_heads=4, n_layers=2, logit_scale=0.2
    ),
    "phi": lambda: PhiConfig(**TINY | {"num_key_value_heads": 4}),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits_of(head: OutputHead, hidden: torch.Tensor) -> torch.Tensor:
    """(N, V), log-probabilities of each word asked one by one."""
    count = len(head.weight)
    repeated = hidden.repeat_interleave(count, 0)
    logprobs, _ = chosen_logprobs(repeated, head, torch.arange(count).repeat(len(hidden)), 1.0)
    return logprobs.view(len(hidden), count)


def head_of(model: Any) -> OutputHead:
    """The head in the form that the self-check finds."""
    form = PackedModel.checked(model).logit_form
    assert form is not None
    head = OutputHead.of(model, form)
    assert head is not None
    return head


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_of_a_model_gives_the_models_own_distribution(name: str) -> None:
    model = build(name)
    head = head_of(model)
    assert (head.bias is not None) == (name == "phi")
    ids = words(6, 97)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        assert expected.std() > 0.05
        torch.testing.assert_close(logits_of(head, hidden), expected, rtol=1e-5, atol=2e-5)


def test_a_setting_that_the_model_around_the_text_model_ignores_is_ignored() -> None:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = AyaVisionConfig(vision_config=vision, text_config=Cohere2Config(**TINY, logit_scale=0.3))
    model = AyaVisionForConditionalGeneration(config).eval()
    ids = words(6, 97)[None]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[0]
        expected = model(input_ids=ids).logits[0].log_softmax(-1)
        torch.testing.assert_close(logits_of(head_of(model), hidden), expected, rtol=1e-5, atol=2e-5)


def test_lora_on_the_layers_leaves_the_head_and_lora_on_the_head_has_none() -> None:
    model = tiny_llama()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    head = OutputHead.of(adapted, LogitForm())
    assert head is not None
    assert head.weight is model.lm_head.weight
    assert not head.weight.requires_grad
    for changes in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        assert (
            OutputHead.of(get_peft_model(tiny_llama(), LoraConfig(**changes, task_type="CAUSAL_LM")), LogitForm())
            is None
        )


def test_a_head_that_is_no_plain_linear_layer_over_the_vocabulary_is_none() -> None:
    class Quantised(torch.nn.Linear):
        pass

    model = tiny_llama()
    model.lm_head = Quantised(32, 260, bias=False)
    assert OutputHead.of(model, LogitForm()) is None
    model = tiny_llama()
    model.config.unpadded_vocab_size = 257
    assert OutputHead.of(model, LogitForm()) is None
