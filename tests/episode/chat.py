"""A tokenizer with merges and the special tokens of the chat templates next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOKENIZER = HERE / "data" / "tokenizer.json"

END_TOKENS = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<eos>",
    "plain": "</s>",
}
"""By template. Gemma's turns end in another token than its end-of-sequence token, and those of `plain` in none."""

SPECIAL = (
    *("<s>", "</s>", "<eos>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[ARGS]", "[CALL_ID]"),
)
MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Tokens of their own that are not special, as Qwen has them."""


def template_text(name: str) -> str:
    return (HERE / "templates" / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def chat_tokenizer(name: str) -> Any:
    """The tokenizer with one of the templates."""
    from transformers import AddedToken, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER),
        bos_token="<s>",
        eos_token=END_TOKENS[name],
        chat_template=template_text(name),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return tokenizer


def train_tokenizer() -> None:
    """Make the file: 400 merges of bytes, among them those of line ends with what is next to them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=656, initial_alphabet=alphabet, show_progress=False)
    texts = [path.read_text(encoding="utf-8") for path in sorted(HERE.rglob("*.jinja"))]
    words = "The result of the sum is 17.\n\nuser\nassistant\n\n</tool_response>\n<tool_response>\n"
    tokenizer.train_from_iterator([text.replace("\\n", "\n") for text in texts] + [words] * 20, trainer)
    tokenizer.save(str(TOKENIZER), pretty=False)
