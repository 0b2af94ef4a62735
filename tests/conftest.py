"""A tiny real model and tokenizer, made here, so that tests need neither a network nor a large download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Several processes on few cores thrash; numbers do not depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes and a few special tokens; every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llama(**changes: Any) -> Any:
    """A randomly initialised Llama of two layers, always the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 256,
        "bos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with its byte tokenizer, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model_dir`, with the head size of 32 that vLLM's attention on a CPU needs."""
    folder = tmp_path_factory.mktemp("vllm-llama")
    tiny_llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_recipe(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A whole recipe that trains the tiny model for three steps in about a second."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "question {i}:", "answer": "{i}"}}\n' for i in range(10)))
    return {
        "model": {"name": str(tiny_model_dir)},
        "data": {"name": str(prompts)},
        "rewards": ["rewards.length:reward_len"],
        "generation": {"num_generations": 4, "max_completion_tokens": 8},
        "optim": {"learning_rate": 1e-3},
        "train": {"output_dir": str(tmp_path / "run"), "max_steps": 3, "prompts_per_step": 3},
        "logging": {"trackers": []},
    }
