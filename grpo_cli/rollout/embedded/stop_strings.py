"""Whether a token completes a stop string, found by decoding only the last few tokens. No torch import."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
"""A token that stands for one byte, in tokenizers whose other tokens are text. Several of them in a row are
decoded together, so such a token has no text of its own."""


class StopStrings:
    """The stop strings of completions. They are looked for in the text with special tokens.

    Args:
        tokenizer: decodes completions.
        stop: the strings.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # How many tokens with text are decoded. Each adds at least one byte, but every second may be a space that
        # the tokenizer removes before punctuation. One more comes first, as some tokenizers drop a leading space.
        self._reach = 2 * max((len(string.encode()) for string in stop), default=0) + 1
        self._kinds: dict[int, tuple[bool, bool]] = {}

    def completed_by_last(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of these tokens holds a stop string, given that without the last one it held none."""
        if not self._stop:
            return False
        text = self._tokenizer.decode(token_ids[self._begin(token_ids) :])
        return any(string in text for string in self._stop)

    def _begin(self, token_ids: Sequence[int]) -> int:
        """Where to begin decoding: as late as leaves enough text for every stop string, at a token whose text does
        not depend on those before it."""
        left = self._reach
        for place in range(len(token_ids) - 1, 0, -1):
            has_text, begins_text = self._kind(token_ids[place])
            left -= has_text
            if left <= 0 and begins_text:
                return place
        return 0

    def _kind(self, token_id: int) -> tuple[bool, bool]:
        """Whether the token has a text, and whether that text is the same whatever comes before the token."""
        if token_id not in self._kinds:
            text = self._tokenizer.decode([token_id])
            is_whole = "\N{REPLACEMENT CHARACTER}" not in text  # and not only some bytes of a character
            piece = self._tokenizer.convert_ids_to_tokens(token_id) or ""
            self._kinds[token_id] = bool(text), bool(text) and is_whole and not BYTE_PIECE.fullmatch(piece)
        return self._kinds[token_id]
