"""What a server is given is the policy as it is now, under the names of its checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from grpo_cli.errors import UserError
from grpo_cli.policy.load import load_policy
from grpo_cli.policy.model import base_model
from grpo_cli.recipe.schema import LoraConfig, ModelConfig
from grpo_cli.rollout.policy_weights import PolicyWeights
from tests.conftest import tiny_llama


def with_lora(model: Any, **settings: Any) -> Any:
    """The model with adapters that do something."""
    policy = load_policy(ModelConfig(name="x", lora=LoraConfig(**{"r": 4} | settings)), model=model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return policy


def merged(policy: Any) -> dict[str, torch.Tensor]:
    """The state dict of the model that PEFT itself makes of the base model and its adapters."""
    state: dict[str, torch.Tensor] = copy.deepcopy(policy).merge_and_unload().state_dict()
    return state


def names(weights: PolicyWeights) -> list[str]:
    return [spec.name for spec in weights.specs("float32")]


def assert_gives(weights: PolicyWeights, expected: dict[str, torch.Tensor]) -> None:
    assert set(names(weights)) == set(expected)
    for spec in weights.specs("float32"):
        assert spec.shape == list(expected[spec.name].shape)
        assert torch.equal(weights.tensor(spec.name), expected[spec.name]), spec.name


def test_a_plain_model_is_given_as_its_state_dict() -> None:
    model = tiny_llama(attention_bias=True)
    weights = PolicyWeights(model)
    assert_gives(weights, model.state_dict())
    assert {spec.dtype for spec in weights.specs("float32")} == {"float32"}
    assert weights.device == torch.device("cpu")


def test_a_tied_weight_is_given_once() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    expected = model.state_dict()
    del expected["lm_head.weight"]
    assert_gives(PolicyWeights(model), expected)


@pytest.mark.parametrize("lora", [False, True])
def test_the_weights_are_those_of_now_and_not_of_when_it_was_made(lora: bool) -> None:
    model = with_lora(tiny_llama()) if lora else tiny_llama()
    weights = PolicyWeights(model)
    before = {name: weights.tensor(name).clone() for name in names(weights)}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    changed = {name for name in before if not torch.equal(before[name], weights.tensor(name))}
    assert len(changed) == (len({name.split(".lora_")[0] for name in trained}) if lora else len(before))
    assert changed
    assert_gives(weights, merged(model) if lora else model.state_dict())


class Parted:
    """Weights of which this process holds the half; says which of them are gathered."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    @contextmanager
    def gathered(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        self.log.append([id(tensor) for tensor in tensors])
        yield
        self.log.append("let go")

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2

    def whole_shape(self, tensor: torch.Tensor) -> torch.Size:
        return tensor.shape


@pytest.mark.parametrize("lora", [False, True])
def test_others_are_told_first_and_what_is_needed_is_gathered_only_as_long_as_it_is_read(lora: bool) -> None:
    model = with_lora(tiny_llama()) if lora else tiny_llama()
    parted = Parted()
    weights = PolicyWeights(model, parted)

    @contextmanager
    def announce(names: Sequence[str]) -> Iterator[None]:
        parted.log.append(f"announced {', '.join(names)}")
        yield

    weights.announce = announce
    names = ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"]
    with weights.gathered(names) as tensor:
        given = {name: tensor(name) for name in names}
    expected = merged(model) if lora else model.state_dict()
    assert all(torch.equal(given[name], 2 * expected[name]) for name in names)
    inner = base_model(model).model
    behind = [inner.norm.weight, *inner.layers[1].self_attn.q_proj.parameters()]
    log = [f"announced {', '.join(names)}", [id(value) for value in behind], "let go"]
    assert parted.log == log
    weights.join_gathering(names)
    assert parted.log == log * 2


def test_nothing_that_is_given_carries_a_gradient() -> None:
    for model in (tiny_llama(), with_lora(tiny_llama())):
        weights = PolicyWeights(model)
        assert not any(weights.tensor(name).requires_grad for name in names(weights))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_adapters_are_merged_and_the_base_model_is_left_as_it_is(settings: dict[str, Any]) -> None:
    model = tiny_llama(attention_bias=True)
    plain = set(model.state_dict())
    policy = with_lora(model, **settings)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    weights = PolicyWeights(policy)
    assert set(names(weights)) == plain
    assert_gives(weights, merged(policy))
    own = tiny_llama(attention_bias=True).state_dict()
    assert not torch.equal(
        weights.tensor("model.layers.0.self_attn.q_proj.weight"), own["model.layers.0.self_attn.q_proj.weight"]
    )
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_is_given_computes_what_the_policy_computes() -> None:
    policy = with_lora(tiny_llama()).eval()
    weights, served = PolicyWeights(policy), tiny_llama().eval()
    served.load_state_dict({name: weights.tensor(name) for name in names(weights)})
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(served(tokens).logits, policy(tokens).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(served(tokens).logits, tiny_llama().eval()(tokens).logits, atol=1e-2)


def test_adapters_elsewhere_leave_tied_weights_tied() -> None:
    policy = with_lora(tiny_llama(tie_word_embeddings=True))
    expected = merged(policy)
    del expected["lm_head.weight"]
    assert_gives(PolicyWeights(policy), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_that_parts_tied_weights_cannot_be_served(settings: dict[str, Any]) -> None:
    policy = with_lora(tiny_llama(tie_word_embeddings=True), **settings)
    with pytest.raises(UserError, match=r"^model\.lora: .* leave both out of target_modules and modules_to_save"):
        PolicyWeights(policy)


@pytest.mark.parametrize(
    "settings", [None, {"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_parameters_travel_in_the_server_s_dtype_and_buffers_in_their_own(settings: Any) -> None:
    model = tiny_llama()
    model.model.register_buffer("scales", torch.ones(3))
    model.model.register_buffer("counts", torch.arange(3))
    policy = model if settings is None else with_lora(model, **settings)
    dtypes = {spec.name: spec.dtype for spec in PolicyWeights(policy).specs("bfloat16")}
    assert dtypes.pop("model.scales") == "float32"
    assert dtypes.pop("model.counts") == "int64"
    assert {name for name, dtype in dtypes.items() if dtype != "bfloat16"} == set()
    assert base_model(policy).dtype == torch.float32


def test_a_model_that_transformers_keeps_in_another_shape_cannot_be_served() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^model\.name: .* mixtral .* use generation\.engine: transformers"):
        PolicyWeights(MixtralForCausalLM(config))
