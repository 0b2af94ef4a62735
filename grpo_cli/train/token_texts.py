"""What tokens say, one by one, so that who reads a run needs no tokenizer. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for bytes that are not, or not yet, a character."""

LONGEST_RUN = 32
"""Tokens that are decoded together at most: a character has no more than four bytes, and what goes on for longer
is no text."""

BEFORE = "a"
"""Tokens are decoded after this: some tokenizers drop the space at the beginning of a text."""


class TokenTexts:
    """Decodes tokens, each only once, but for those that hold parts of characters.

    Args:
        tokenizer: of the policy.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before = list(tokenizer.encode(BEFORE, add_special_tokens=False))
        self._length_before = len(self._decoded([]))
        self._texts: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token, special ones by name. A character of several tokens is the last one's, and ""
        the others'. Joined they are what the tokenizer makes of them after some text."""
        for token in set(token_ids).difference(self._texts):
            self._texts[token] = self._after_text([token])
        texts: list[str] = []
        for is_part, run in groupby(token_ids, lambda token: UNFINISHED in self._texts[token]):
            neighbours = list(run)
            texts += self._of_parts(neighbours) if is_part else map(self._texts.__getitem__, neighbours)
        return texts

    def _of_parts(self, token_ids: list[int]) -> list[str]:
        """The texts of neighbours that hold parts of characters: of each, what is finished with it."""
        texts = []
        start = told = 0
        for end in range(1, len(token_ids) + 1):
            text = self._after_text(token_ids[start:end])
            is_whole = not text.endswith(UNFINISHED) or end in (len(token_ids), start + LONGEST_RUN)
            finished = text if is_whole else text.rstrip(UNFINISHED)
            texts.append(finished[told:])
            start, told = (end, 0) if is_whole else (start, max(told, len(finished)))
        return texts

    def _after_text(self, token_ids: list[int]) -> str:
        return self._decoded(token_ids)[self._length_before :]

    def _decoded(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            [*self._before, *token_ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
