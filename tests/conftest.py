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

CLUSTER = ("tests/slurm/test_five_nodes.py", "tests/slurm/test_job_script.py")
"""Tests that share the emulated Slurm cluster, of which a machine can have one."""

LONGEST_FIRST = (
    "tests/integration/test_vllm_training.py",
    "tests/faults/test_kills.py",
    *CLUSTER,
    "tests/integration/test_serve.py",
    "tests/integration/test_processes.py",
    "tests/integration/test_smollm2.py",
    "tests/integration/test_cli_train.py",
)
"""Files that take more than a minute each. One that began last would leave all workers but its own idle."""


def file_of(nodeid: str) -> str:
    return nodeid.split("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then the others with slow tests."""
    slow = {file_of(item.nodeid) for item in items if item.get_closest_marker("slow")}
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(file_of(item.nodeid), 100 + (file_of(item.nodeid) not in slow)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests are one worker's, so that what they share is made once; the Slurm cluster's are, too."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = file_of(nodeid)
            return "the cluster" if file in CLUSTER else file

    return ByFile(config, log)


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
