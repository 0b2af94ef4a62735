"""What two recipes would do differently: one comparison for `grpo recipe diff`, `--resume` and reports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import Any, Final

from grpo_cli.recipe.raw import readable


class _Absent:
    """The value of a key or list entry that one side lacks."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()

MAX_SHOWN = 300
"""Characters of a value in a line."""

SHOWN_BEFORE = 40
"""Characters of two long values that are shown before the place where they part."""


@dataclass(frozen=True)
class Difference:
    """A setting that two recipes give different values; `ABSENT` where one has no such key or entry."""

    key: str
    """Dotted, as for `--set`."""
    before: Any
    after: Any

    @property
    def texts(self) -> tuple[str, str]:
        """Both values as docs/recipe.md writes them, on one line; of long ones the part where they differ."""
        texts = _written(self.before), _written(self.after)
        start = 0
        if max(map(len, texts)) > MAX_SHOWN:
            same = (ours == theirs for ours, theirs in zip(*texts, strict=False))
            start = max(0, len(list(takewhile(bool, same))) - SHOWN_BEFORE)
        before, after = (readable("..." * (start > 0) + text[start:], MAX_SHOWN) for text in texts)
        return before, after

    def __str__(self) -> str:
        before, after = self.texts
        return f"{self.key}: {before} -> {after}"


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Every setting that differs, in the order of `before`, then what only `after` has.

    Args:
        before: a recipe as plain values, `Recipe.model_dump(mode="json")`, or a section of one.
        after: the other.

    Returns:
        One entry for each key. Lists of sections, such as `rewards`, are compared entry by entry, other lists as a
        whole; a section that one side leaves empty is one difference.
    """
    return list(_differences("", before, after))


def _differences(key: str, before: Any, after: Any) -> Iterator[Difference]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = [*before, *(name for name in after if name not in before)]
        pairs = [(name, before.get(name, ABSENT), after.get(name, ABSENT)) for name in names]
    elif _is_list(before) and _is_list(after) and any(isinstance(entry, Mapping) for entry in [*before, *after]):
        entries = zip_longest(before, after, fillvalue=ABSENT)
        pairs = [(str(place), old, new) for place, (old, new) in enumerate(entries)]
    else:
        if before != after:
            yield Difference(key, before, after)
        return
    for name, old, new in pairs:
        yield from _differences(f"{key}.{name}" if key else name, old, new)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _written(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    return "empty" if value is None else json.dumps(value, ensure_ascii=False)
