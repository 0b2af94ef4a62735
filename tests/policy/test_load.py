"""A model is loaded from wherever it is, ready to be trained; one that cannot be is one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, MambaConfig

from grpo_cli.errors import UserError
from grpo_cli.policy.export import save_standalone, save_weights
from grpo_cli.policy.load import load_policy, load_tokenizer
from tests.conftest import byte_tokenizer, tiny_llama
from tests.policy.test_export import (
    IDS,
    assert_equal_bits,
    logits,
    restore,
    settings,
    state_of,
    train_a_little,
)


def test_a_fresh_adapter_changes_nothing_and_trains_alone(tiny_model_dir: Path) -> None:
    model = load_policy(settings(tiny_model_dir, lora={"r": 4, "modules_to_save": ["norm"]}))
    assert torch.equal(logits(model), logits(tiny_llama().eval()))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    plain = load_policy(settings(tiny_model_dir, lora={"r": 4}), adapters=False)
    assert not isinstance(plain, PeftModel)


def test_the_policy_is_in_training_mode_so_adapter_dropout_works(tiny_model_dir: Path) -> None:
    model = load_policy(settings(tiny_model_dir, lora={"r": 4, "dropout": 0.5}))
    train_a_little(model)
    assert model.training
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradient(
    tiny_model_dir: Path, lora: dict[str, Any] | None
) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = load_policy(settings(tiny_model_dir, gradient_checkpointing=checkpointing, lora=lora))
        train_a_little(model)
        count: list[int] = []
        layer = model.get_base_model().model.layers[0] if lora else model.model.layers[0]
        layer.self_attn.register_forward_hook(lambda *_, count=count: count.append(1))
        model(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        calls.append(len(count))
    assert calls == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_model_object_is_trained_in_place(tiny_model_dir: Path) -> None:
    model = tiny_llama()
    assert load_policy(settings(tiny_model_dir), model=model) is model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "./no/such/folder"}, "there is no folder ./no/such/folder"),
        ({"name": "no-such-model.gguf"}, "there is no file no-such-model.gguf"),
        ({"gguf_file": "x.gguf"}, "model.gguf_file: there is no x.gguf"),
        (
            {"name": "nobody/no-such-model-here"},
            "cannot load nobody/no-such-model-here: HF_HUB_OFFLINE is set, .* set model.name to a folder",
        ),
    ],
)
def test_a_model_that_is_not_there_is_one_message(
    tiny_model_dir: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_policy(settings(tiny_model_dir, **changes))


def test_a_damaged_model_is_one_message(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot load"):
        load_policy(settings(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(UserError, match="no-such-architecture"):
        load_policy(settings(tmp_path))


def test_weights_cut_short_are_one_message(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    whole = (tiny_model_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot load"):
        load_policy(settings(tmp_path))


def test_a_model_without_the_kernel_says_what_to_write(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"set model\.attn_implementation to auto"):
        load_policy(settings(tmp_path, attn_implementation="sdpa"))
    assert load_policy(settings(tmp_path)).config.model_type == "mamba"


def write_gguf(path: Path, model: Any) -> None:
    """The tiny Llama and a tokenizer of bytes, as llama.cpp would write them, without quantisation."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    tokenizer = byte_tokenizer()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([1] * 256 + [3] * (len(tokenizer) - 256))
    writer.add_token_scores([0.0] * len(tokenizer))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp keeps rotary halves interleaved
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_loaded_trained_and_saved_as_any_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    start = tiny_llama().eval()
    write_gguf(tmp_path / "tiny.gguf", start)
    config = settings(tmp_path / "tiny.gguf")
    model = load_policy(config)
    torch.testing.assert_close(logits(model), logits(start), rtol=1e-5, atol=1e-5)
    tokenizer = load_tokenizer(config)
    assert tokenizer.decode(tokenizer("any text, déjà vu")["input_ids"]) == "any text, déjà vu"
    train_a_little(model)
    save_weights(model, tmp_path / "saved")
    other = load_policy(config)
    restore(other, tmp_path / "saved")
    assert_equal_bits(state_of(other), state_of(model))
    save_standalone(model, tokenizer, tmp_path / "final")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "final")), logits(model))


def test_the_chat_template_comes_from_the_recipe_or_a_file_or_the_tokenizer(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    own = load_tokenizer(settings(tiny_model_dir)).chat_template
    assert own == byte_tokenizer().chat_template
    template = "{{ messages[0]['content'] }}!é"
    assert load_tokenizer(settings(tiny_model_dir, chat_template=template)).chat_template == template
    file = tmp_path / "chat.jinja"
    file.write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(settings(tiny_model_dir, chat_template=str(file)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!é"
    with pytest.raises(UserError, match=r"model\.chat_template: there is no file nowhere\.jinja"):
        load_tokenizer(settings(tiny_model_dir, chat_template="nowhere.jinja"))


def test_a_tokenizer_of_another_folder_can_be_used(tiny_model_dir: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model"):
        load_tokenizer(settings(tmp_path))
    assert load_tokenizer(settings(tmp_path, tokenizer=str(tiny_model_dir))).eos_token == "<|end|>"


def test_a_tokenizer_without_an_end_is_refused(tiny_model_dir: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token, so completions would never end"):
        load_tokenizer(settings(tiny_model_dir), tokenizer=tokenizer)
