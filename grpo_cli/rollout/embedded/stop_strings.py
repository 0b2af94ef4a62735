"""Whether a token completes a stop string, at a cost that does not depend on the tokens before it. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
"""A token of one byte, where the rest are of characters: a row of such tokens is decoded as a whole."""


class StopStrings:
    """The stop strings of completions, which are found as in the text of all tokens, special ones included.

    Args:
        tokenizer: decodes completions.
        stop: the strings.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # A token with text has a byte at least, unless it is a space that is cleaned up before the next one. The
        # first of those that are decoded is one more: some tokenizers leave out the space that it begins with.
        self._reach = 2 * max((len(string.encode()) for string in stop), default=0) + 1
        self._kinds: dict[int, tuple[bool, bool]] = {}

    def completed_by_last(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of these tokens holds a stop string, given that without the last one it held none."""
        if not self._stop:
            return False
        text = self._tokenizer.decode(token_ids[self._begin(token_ids) :])
        return any(string in text for string in self._stop)

    def _begin(self, token_ids: Sequence[int]) -> int:
        """Place of a token from which on the text is that of the whole, and long enough for every stop string."""
        left = self._reach
        for place in range(len(token_ids) - 1, 0, -1):
            has_text, begins_text = self._kind(token_ids[place])
            left -= has_text
            if left <= 0 and begins_text:
                return place
        return 0

    def _kind(self, token_id: int) -> tuple[bool, bool]:
        """Whether it has a text of its own, and whether that is the same whatever precedes it."""
        if token_id not in self._kinds:
            text = self._tokenizer.decode([token_id])
            is_whole = "\N{REPLACEMENT CHARACTER}" not in text  # no part of a character
            piece = self._tokenizer.convert_ids_to_tokens(token_id) or ""
            self._kinds[token_id] = bool(text), bool(text) and is_whole and not BYTE_PIECE.fullmatch(piece)
        return self._kinds[token_id]
