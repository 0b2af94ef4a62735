"""The prompts of a run, as the rewards see them and as the tokens that the model sees.

To the rows of `rows.py` this module adds a tokenizer and a limit on length. The tokenizer is passed in, so neither
transformers nor torch is imported.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_cli.data.rows import Messages, PromptRows
from grpo_cli.errors import UserError, one_line

_TOKENIZE_AT_ONCE = 256


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, as the rewards and the model see it."""

    row: int
    """Row of the data set as loaded, counted from 0."""
    content: str | Messages
    """What reward functions get as `prompts[i]`."""
    token_ids: list[int]
    """What the model sees."""
    columns: dict[str, Any]
    """Every other column, handed to the rewards."""


class PromptDataset:
    """Prompts with their tokens, those over `max_prompt_tokens` dropped, cut or refused.

    Args:
        rows: the prompts.
        tokenizer: a transformers tokenizer.
        chat_template_kwargs: passed on to its chat template.

    Raises:
        UserError: the tokenizer has no chat template and needs one, or prompts are too long.
    """

    dropped: int
    """Prompts left out for length."""
    truncated: int
    """Prompts cut for length."""

    def __init__(
        self, rows: PromptRows, tokenizer: Any, *, chat_template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.rows = rows
        self.dropped = 0
        self.truncated = 0
        self._tokenizer = tokenizer
        self._template_kwargs = chat_template_kwargs or {}
        if rows.conversational and getattr(tokenizer, "chat_template", "") is None:
            raise UserError(
                f"{rows.setting}: the prompts are chats, and the tokenizer has no chat template; set "
                "model.chat_template, or use prompts that are strings, without a system_prompt"
            )
        self._kept: Sequence[int] = range(len(rows))
        self._tokens: list[array[int]] | None = None
        if rows.config.max_prompt_tokens is not None:
            self._limit_length(rows.config.max_prompt_tokens)
        elif rows.conversational:
            self._encode([0])  # a chat template that does not work fails here, not in the first step

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Prompt:
        row = self._kept[index]
        tokens = self._encode([row])[0] if self._tokens is None else self._tokens[index].tolist()
        return Prompt(row, self.rows.content(row), tokens, self.rows.row_columns(row))

    def _limit_length(self, limit: int) -> None:
        """Tokenize every prompt, once, and apply `long_prompts` to those over the limit."""
        policy = self.rows.config.long_prompts
        kept: list[int] = []
        tokens: list[array[int]] = []
        over: list[tuple[int, int]] = []  # row, length
        for start in range(0, len(self.rows), _TOKENIZE_AT_ONCE):
            rows = range(start, min(start + _TOKENIZE_AT_ONCE, len(self.rows)))
            for row, ids in zip(rows, self._encode(rows), strict=True):
                if len(ids) > limit:
                    over.append((row, len(ids)))
                    if policy != "truncate_left":
                        continue
                kept.append(row)
                tokens.append(array("i", ids[-limit:]))
        if over and (policy == "error" or not kept):
            raise self._too_long(over, limit)
        self.dropped, self.truncated = (0, len(over)) if policy == "truncate_left" else (len(over), 0)
        self._kept, self._tokens = kept, tokens

    def _too_long(self, over: list[tuple[int, int]], limit: int) -> UserError:
        key = f"{self.rows.setting}.max_prompt_tokens"
        if len(over) == len(self.rows):
            shortest = min(length for _, length in over)
            return UserError(
                f"{key}: every prompt has more than {limit} tokens, the shortest {shortest}; raise it"
            )
        row, length = over[0]
        return UserError(
            f"{key}: row {row + 1} has {length} tokens, more than {limit} ({len(over)} of {len(self.rows)} "
            f"rows do); raise it, or write {self.rows.setting}.long_prompts: drop or truncate_left"
        )

    def _encode(self, rows: Sequence[int]) -> list[list[int]]:
        """The tokens of some rows; together, because that is several times faster."""
        contents = [self.rows.content(row) for row in rows]
        if not self.rows.conversational:
            batch = self._tokenizer(contents)["input_ids"]
        else:
            try:
                batch = self._tokenizer.apply_chat_template(
                    contents,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                    **self._template_kwargs,
                )
            except Exception as error:  # a template raises what it likes
                if len(rows) > 1:
                    return [self._encode([row])[0] for row in rows]
                raise UserError(
                    f"{self.rows.where}: row {rows[0] + 1}: the chat template fails on the prompt: "
                    f"{type(error).__name__}: {one_line(error)}"
                ) from error
        return [ids or self._no_tokens(row) for row, ids in zip(rows, batch, strict=True)]

    def _no_tokens(self, row: int) -> list[int]:
        start: int | None = getattr(self._tokenizer, "bos_token_id", None)
        if start is None:
            raise UserError(
                f"{self.rows.where}: row {row + 1} has no tokens with this tokenizer, which has no token for "
                "the beginning of a text either; remove the row"
            )
        return [start]
