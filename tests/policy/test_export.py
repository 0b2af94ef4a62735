"""Weights go out and come back bit for bit, and adapters merge to the same model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from grpo_cli.policy.export import (
    exported_tensors,
    gathered,
    gathered_standalone,
    gathered_weights,
    save_standalone,
    save_weights,
    saved_weights,
)
from grpo_cli.policy.load import load_policy
from grpo_cli.recipe.schema import ModelConfig
from tests.conftest import byte_tokenizer, tiny_llama

IDS = torch.tensor([[5, 6, 7, 8, 200, 100, 3]])

LORAS: dict[str, dict[str, Any]] = {
    "all linear layers": {"r": 4, "alpha": 8},
    "two layers": {"r": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    "embeddings": {"r": 2, "alpha": 4, "target_modules": ["embed_tokens", "v_proj"]},
    "head": {"r": 2, "alpha": 4, "target_modules": ["lm_head", "v_proj"]},
    "a norm in full": {"r": 4, "alpha": 8, "modules_to_save": ["norm"]},
    "the head in full": {"r": 4, "alpha": 8, "modules_to_save": ["lm_head"]},
    "embeddings in full": {"r": 4, "alpha": 8, "modules_to_save": ["embed_tokens"]},
    "head and embeddings in full": {"r": 4, "alpha": 8, "modules_to_save": ["lm_head", "embed_tokens"]},
}


def logits(model: Any) -> torch.Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model(input_ids=IDS).logits.float()
    model.train(was_training)
    return output


def train_a_little(model: Any) -> None:
    """Move every trainable weight."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.1 * noise.to(parameter.dtype)


def restore(model: Any, folder: Path) -> None:
    model.load_state_dict(saved_weights(model, folder), strict=False)


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def settings(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": str(folder)} | changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_full_weights_come_back_bit_for_bit(tmp_path: Path, dtype: str, tied: bool) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "start")
    config = settings(tmp_path / "start", dtype=dtype)
    model = load_policy(config)
    train_a_little(model)
    save_weights(model, tmp_path / "saved")
    other = load_policy(config)
    parameters = list(other.parameters())
    restore(other, tmp_path / "saved")
    assert_equal_bits(state_of(other), state_of(model))
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True)), "an optimizer holds them"
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LORAS)
def test_adapters_come_back_bit_for_bit(tiny_model_dir: Path, tmp_path: Path, name: str, dtype: str) -> None:
    config = settings(tiny_model_dir, lora=LORAS[name], dtype=dtype)
    model = load_policy(config)
    train_a_little(model)
    save_weights(model, tmp_path)
    other = load_policy(config)
    parameters = list(other.parameters())
    restore(other, tmp_path)
    assert_equal_bits(state_of(other), state_of(model))
    assert torch.equal(logits(other), logits(model))
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))


def test_saving_an_adapter_asks_no_network(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_policy(settings(tiny_model_dir, lora={"r": 2}))
    model.peft_config["default"].base_model_name_or_path = "some/model-on-the-hub"
    calls: list[Any] = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *a, **k: calls.append(a))
    save_weights(model, tmp_path)
    assert not calls


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LORAS)
def test_the_merged_model_answers_as_the_adapted_one_and_the_adapter_is_untouched(
    tmp_path: Path, name: str, tied: bool
) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "start")
    model = load_policy(settings(tmp_path / "start", lora=LORAS[name]))
    train_a_little(model)
    before = state_of(model)
    wanted = logits(model)
    save_standalone(model, byte_tokenizer(), tmp_path / "final")
    assert_equal_bits(state_of(model), before)
    assert torch.equal(logits(model), wanted)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert not isinstance(plain, PeftModel)
    assert not (tmp_path / "final" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-5, atol=1e-4)
    parted = any(word in name for word in ("head", "embeddings"))
    assert plain.config.tie_word_embeddings == (tied and not parted), "vLLM reads one weight where this says so"
    assert model.config.tie_word_embeddings == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "final").eos_token == "<|end|>"


def test_the_layers_of_gpt2_merge_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    model = load_policy(settings(tmp_path / "start", lora={"r": 4, "alpha": 8}))
    train_a_little(model)
    save_standalone(model, byte_tokenizer(), tmp_path / "final")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-4)


def test_a_full_model_is_written_as_it_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_policy(settings(tiny_model_dir))
    train_a_little(model)
    save_standalone(model, byte_tokenizer(), tmp_path)
    assert_equal_bits(state_of(AutoModelForCausalLM.from_pretrained(tmp_path)), state_of(model))


def test_an_adapter_parts_tied_weights_before_it_is_trained(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "start")
    model = load_policy(settings(tmp_path / "start", lora=LORAS["head"]))
    assert {tensor.name for tensor in exported_tensors(model) if tensor.is_parted} == {"lm_head.weight"}
    save_standalone(model, byte_tokenizer(), tmp_path / "final")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert not plain.config.tie_word_embeddings
    torch.testing.assert_close(logits(plain), logits(model))


class Counting:
    """Weights that all ranks have to put together, of which this one keeps a count."""

    def __init__(self) -> None:
        self.log: list[str] = []

    @contextmanager
    def gathered(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        self.log.append(f"gather {len(tensors)}")
        try:
            yield
        finally:
            self.log.append("let go")

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        self.log.append(f"whole {tuple(tensor.shape)}")
        return tensor


def test_after_an_error_this_rank_does_its_part_for_the_others_all_the_same() -> None:
    counting, tensors = Counting(), exported_tensors(tiny_llama())[:3]
    shapes = [f"whole {tuple(tensor.origin.shape)}" for tensor in tensors]

    def ask_once() -> None:
        with gathered(tensors, counting) as whole:
            whole(tensors[0].name)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ask_once()
    assert counting.log == ["gather 3", *shapes, "let go"]


@pytest.mark.parametrize("lora", [None, *LORAS])
def test_one_weight_at_a_time_is_gathered_and_only_rank_0_keeps_it(tiny_model_dir: Path, lora: str | None) -> None:
    model = load_policy(settings(tiny_model_dir, lora=None if lora is None else LORAS[lora]))
    train_a_little(model)
    for gather in (gathered_weights, gathered_standalone):
        counting = Counting()
        kept = gather(model, counting, True)
        assert [entry.split()[0] for entry in counting.log] == ["gather", "whole", "let"] * len(kept)
        others = Counting()
        assert gather(model, others, False) == {}
        assert others.log == counting.log
        held = {parameter.data_ptr() for parameter in model.parameters()}
        assert not any(value.requires_grad or value.data_ptr() in held for value in kept.values())
