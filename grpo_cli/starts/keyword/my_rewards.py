"""Rewards of this experiment."""

from typing import Any


def mentions_keyword(completions: list[str], keyword: list[str | None], **_: Any) -> list[float | None]:
    """1.0 where the completion mentions the row's keyword, else 0.0; None where the row has none.

    Every list has one entry per completion. `keyword` is a column of the dataset: any column can be an argument.
    """
    return [
        None if word is None else float(word.lower() in completion.lower())
        for completion, word in zip(completions, keyword, strict=True)
    ]
