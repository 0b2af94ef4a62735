"""Weights go out and come back bit for bit, adapters merge to the same model, and the reference stands still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BioGptConfig,
    BloomConfig,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
)

from grpo_cli.errors import UserError
from grpo_cli.policy.files import count_parameters, locate_gguf
from grpo_cli.policy.model import (
    load_policy,
    load_tokenizer,
    save_standalone,
    save_weights,
    saved_weights,
    without_dropout,
)
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


def test_a_fresh_adapter_changes_nothing_and_trains_alone(tiny_model_dir: Path) -> None:
    model = load_policy(settings(tiny_model_dir, lora={"r": 4, "modules_to_save": ["norm"]}))
    assert torch.equal(logits(model), logits(tiny_llama().eval()))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    plain = load_policy(settings(tiny_model_dir, lora={"r": 4}), adapters=False)
    assert not isinstance(plain, PeftModel)


DROPOUT: dict[str, Any] = {
    "gpt2": GPT2Config(
        vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.1, resid_pdrop=0.1
    ),
    "opt": OPTConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=48,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.1,
        attention_dropout=0.1,
        layerdrop=0.5,
    ),
    "bloom": BloomConfig(
        vocab_size=260, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1, attention_dropout=0.1
    ),
    "biogpt": BioGptConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
    "mixtral": MixtralConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=2,
        attention_dropout=0.1,
        router_jitter_noise=0.5,
    ),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_two_forwards_of_the_model_in_training_agree(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DROPOUT[name]).train()
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, model(IDS).logits), "the model has dropout to switch off"
        without_dropout(model)
        assert torch.equal(model(IDS).logits, model(IDS).logits)


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
        ({"name": "nobody/no-such-model-here"}, "cannot load nobody/no-such-model-here; without a network"),
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


def test_gguf_files_are_found(tmp_path: Path) -> None:
    assert locate_gguf("org/model", None) == ("org/model", None)
    assert locate_gguf("org/model", "q8.gguf") == ("org/model", "q8.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert locate_gguf(str(tmp_path / "a.gguf"), None) == (str(tmp_path), "a.gguf")
    assert locate_gguf(str(tmp_path), None) == (str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"holds several, set it to one of a\.gguf, b\.gguf"):
        locate_gguf(str(tmp_path), None)
    assert locate_gguf(str(tmp_path), "b.gguf") == (str(tmp_path), "b.gguf")
    with pytest.raises(UserError, match=r"there is no c\.gguf in .*; found a\.gguf, b\.gguf"):
        locate_gguf(str(tmp_path), "c.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert locate_gguf(str(tmp_path), None) == (str(tmp_path), None), "a folder of safetensors is that"
    for name in ("./nowhere", "/nowhere/at/all", "~/no-such-folder", "a/b/c"):
        with pytest.raises(UserError, match="there is no folder"):
            locate_gguf(name, None)


def test_parameters_are_counted_from_the_headers(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert count_parameters(tiny_model_dir) == sum(p.numel() for p in tiny_llama().parameters())
    assert count_parameters(tmp_path) is None


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
