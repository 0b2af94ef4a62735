"""Tokens one by one say what the tokenizer says of all of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_cli.train.token_texts import LONGEST_RUN, TokenTexts
from tests.conftest import byte_tokenizer
from tests.episode.chat import chat_tokenizer


def sentencepiece_like() -> Any:
    """A tokenizer with spaces in its tokens, bytes for what it has no token for, and no space at the beginning."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc", "▁a", "▁b", "▁ab"]
    vocabulary = {name: place for place, name in enumerate(names)}
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(Regex("^ "), "")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer(), "merges": chat_tokenizer("qwen2_5"), "pieces": sentencepiece_like()}


def decoded(tokenizer: Any, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("ab é你😀 \n"), max_size=20))
def test_the_texts_of_a_texts_tokens_are_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    texts = TokenTexts(tokenizer)(token_ids)
    assert len(texts) == len(token_ids)
    assert "".join(texts).removeprefix(" ") == decoded(tokenizer, token_ids).removeprefix(" ")


@pytest.mark.parametrize("name", ["bytes", "merges"])
@given(data=st.data())
def test_any_tokens_say_what_the_tokenizer_says_of_them(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=LONGEST_RUN))
    assert "".join(TokenTexts(tokenizer)(token_ids)) == decoded(tokenizer, token_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_of_several_tokens_is_the_last_ones(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode("a😀你", add_special_tokens=False)
    assert TokenTexts(tokenizer)(token_ids)[-7:] == ["", "", "", "😀", "", "", "你"]


def test_special_tokens_are_shown_by_name() -> None:
    tokenizer = TOKENIZERS["merges"]
    token_ids = [*tokenizer.encode("a", add_special_tokens=False), tokenizer.eos_token_id]
    assert TokenTexts(tokenizer)(token_ids) == ["a", "<|im_end|>"]


def test_a_character_that_stays_unfinished_is_not_lost() -> None:
    tokenizer = TOKENIZERS["bytes"]
    start, *_ = tokenizer.encode("😀", add_special_tokens=False)
    assert TokenTexts(tokenizer)([start, tokenizer.eos_token_id]) == ["\N{REPLACEMENT CHARACTER}", "<|end|>"]


def test_each_token_is_decoded_once() -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def encode(self, text: str, **options: Any) -> list[int]:
            return list(TOKENIZERS["bytes"].encode(text, **options))

        def decode(self, token_ids: list[int], **options: Any) -> str:
            self.calls += 1
            return decoded(TOKENIZERS["bytes"], token_ids)

    tokenizer = Counting()
    texts = TokenTexts(tokenizer)
    texts(tokenizer.encode("hello, world"))
    calls = tokenizer.calls
    texts(tokenizer.encode("world, hello" * 9))
    assert tokenizer.calls == calls
