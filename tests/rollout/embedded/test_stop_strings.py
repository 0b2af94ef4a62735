"""A stop string is found at the token that completes it, as in the whole text, however long that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from grpo_cli.policy.load import load_tokenizer
from grpo_cli.recipe.schema import ModelConfig
from grpo_cli.rollout.embedded.stop_strings import StopStrings
from tests.conftest import byte_tokenizer

SMOLLM2 = Path(__file__).parents[3] / "models" / "SmolLM2-135M-Instruct"
TEXTS = ["Hello, world! It 's 12 .\n\n", "naïve café €5 日本語 👩‍👩‍👧 ", "<|im_end|>", "    x = [1,2]\n", "�"]


def bpe() -> Any:
    if not SMOLLM2.is_dir():
        pytest.skip("`make model` brings SmolLM2-135M-Instruct")
    return load_tokenizer(ModelConfig(name=str(SMOLLM2)))


def with_byte_pieces() -> Any:
    """As Llama 2's: words begin with a mark that is a space, and any other character is a row of bytes."""
    pieces = ["<unk>", "▁Hello", "▁world", "▁", "l", "o", ",", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def cleaning() -> Any:
    """Leaves out spaces before punctuation."""
    tokenizer = bpe()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return tokenizer


MAKERS = {"bpe": bpe, "bytes": byte_tokenizer, "byte pieces": with_byte_pieces, "cleaning": cleaning}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]()


def first_end(ends: Any, token_ids: Sequence[int]) -> int | None:
    return next((n for n in range(1, len(token_ids) + 1) if ends(token_ids[:n])), None)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_completion_ends_where_its_whole_text_first_holds_a_stop_string(tokenizer: Any, data: Any) -> None:
    some_ids = st.lists(st.integers(0, len(tokenizer) + 2), max_size=6)  # those that the vocabulary lacks, too
    of_text = st.sampled_from(TEXTS).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    token_ids = [i for part in data.draw(st.lists(st.one_of(some_ids, of_text), max_size=8)) for i in part]
    text = tokenizer.decode(token_ids)
    spans = data.draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(1, 6)), max_size=3))
    stop = [text[begin : begin + length] for begin, length in spans if begin < len(text)] + ["never"]
    # A byte that makes those before it invalid turns them all into replacement characters, however far back.
    stop = [string for string in stop if "\N{REPLACEMENT CHARACTER}" not in string]
    wanted = first_end(lambda ids: any(string in tokenizer.decode(ids) for string in stop), token_ids)
    assert first_end(StopStrings(tokenizer, stop).completed_by_last, token_ids) == wanted


def test_what_is_decoded_for_a_token_does_not_grow_with_the_completion() -> None:
    decoded: list[int] = []

    class Counting:
        inner = byte_tokenizer()

        def decode(self, token_ids: list[int]) -> str:
            decoded.append(len(token_ids))
            return str(self.inner.decode(token_ids))

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return str(self.inner.convert_ids_to_tokens(token_id))

    stop_strings = StopStrings(Counting(), ["\nQuestion:"])
    token_ids = byte_tokenizer().encode("The answer is 42 €. " * 200)
    assert not any(stop_strings.completed_by_last(token_ids[:n]) for n in range(1, len(token_ids) + 1))
    assert max(decoded) <= 25
