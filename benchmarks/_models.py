"""Models, tokenizers and prompts of the benchmarks. Nothing is downloaded.

torch and transformers are imported where they are used: the process that hands out the work has no use for them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_cli.data.prompts import Prompt

DEFAULT_MODEL = "models/SmolLM2-135M-Instruct"
"""What `make model` fetches."""

RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "random-tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "random-qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "random-qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "random-qwen3-tiny": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    },
    "random-qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "random-qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
"""Shapes of published models, Qwen2's where no `model_type` is named, with random weights and tied embeddings; and
a tokenizer with a word for every token."""

POSITIONS = 131_072
"""Longest sequence of a random model."""

LETTERS = "bcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

_WORD = re.compile(r"Ġ[a-z]+|w\d+")
"""Tokens that stand for a whole word, so that text made of them is cut into the same tokens again."""


@dataclass(frozen=True)
class Shape:
    """Tokens of a prompt and of each completion."""

    prompt: int
    completion: int

    def __str__(self) -> str:
        return f"{self.prompt}→{self.completion}"


def parse_shapes(text: str) -> list[Shape]:
    """`300x32,100x100` as shapes."""
    return [Shape(*(int(part) for part in shape.split("x"))) for shape in text.split(",")]


@dataclass(frozen=True)
class ModelSize:
    """Weights that take part in matrix products."""

    body: int
    """Of all linear layers but the output head."""
    head: int
    """Vocabulary times width."""

    @classmethod
    def of(cls, model: Any) -> ModelSize:
        import torch

        head = model.get_output_embeddings()
        linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
        return cls(sum(part.weight.numel() for part in linear), head.weight.numel())


def load(name: str) -> tuple[Any, Any]:
    """The float32 model and the tokenizer `name`, on the CPU: one of RANDOM_MODELS, or as a recipe names them."""
    import torch
    import transformers

    from grpo_cli.policy.load import load_policy, load_tokenizer
    from grpo_cli.recipe.schema import ModelConfig

    transformers.utils.logging.disable_progress_bar()
    if name not in RANDOM_MODELS:
        config = ModelConfig(name=name)
        return load_policy(config), load_tokenizer(config)
    return random_model(name, "cpu", torch.float32), word_tokenizer(RANDOM_MODELS[name]["vocab_size"])


def random_model(name: str, device: str, dtype: Any) -> Any:
    """One of RANDOM_MODELS, made where it shall be: a large one takes minutes on a CPU."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"model_type": "qwen2"} | RANDOM_MODELS[name]
    kind = shape.pop("model_type")
    config = transformers.AutoConfig.for_model(
        kind, **shape, tie_word_embeddings=True, max_position_embeddings=POSITIONS
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer whose tokens are the words `w0`, `w1`, … and two special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocab_size - 2)}
    words |= {"<unknown>": vocab_size - 2, "<end>": vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unknown>", eos_token="<end>", pad_token="<end>"
    )


def letter_tokenizer(vocab_size: int) -> Any:
    """A tokenizer whose tokens are single characters, most of them an `a`, and the two special ones.

    LETTERS follow each other in every eighth token, so that text of tokens drawn at random has few different ones.
    Digits, which tell tokens of one character apart, are not part of the text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["a" if index % 8 else LETTERS[index // 8 % len(LETTERS)] for index in range(vocab_size - 2)]
    words = {f"{character}{index}": index for index, character in enumerate(characters)}
    words |= {"<unknown>": vocab_size - 2, "<end>": vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(r"\d+"), ""), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unknown>", eos_token="<end>", pad_token="<end>"
    )


def single_words(tokenizer: Any) -> list[int]:
    """Tokens that are a word each."""
    return sorted(index for token, index in tokenizer.get_vocab().items() if _WORD.fullmatch(token))


def random_prompts(tokenizer: Any, count: int, length: int, seed: int) -> list[str]:
    """Different texts of words drawn at random that are exactly `length` tokens each.

    Raises:
        ValueError: the tokenizer has no words to make such texts of.
    """
    words = single_words(tokenizer)
    source = random.Random(seed)
    texts: list[str] = []
    for _ in range(20 * count):
        text = tokenizer.decode(source.choices(words, k=length))
        if len(tokenizer(text)["input_ids"]) == length:
            texts.append(text)
        if len(texts) == count:
            return texts
    raise ValueError(f"no texts of exactly {length} tokens could be made with this tokenizer")


def as_prompts(prompts: Sequence[Sequence[int]]) -> list[Prompt]:
    """Token ids, as engines are asked with them."""
    return [Prompt(row, "", list(token_ids), {}) for row, token_ids in enumerate(prompts)]
