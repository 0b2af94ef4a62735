"""Rows of tokens in which sequences share their beginnings. Pure functions: no model, no I/O.

Sequences that begin alike are a tree, and a row holds it in preorder. A stem is a run of tokens that several
sequences have in common. Behind it lie its branches side by side, each the rest of one sequence; then come further
stems that go on from it, each with what goes on from that. A prompt and its completions are a stem and branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from grpo_cli.algorithm.transfer import to_device


@dataclass(frozen=True)
class Stem:
    """Where a stem lies in its row, and what goes on from it."""

    start: int
    length: int
    """At least one token."""
    branch_lengths: tuple[int, ...]
    """Of the branches, which lie right behind it. None is empty."""
    position: int
    """Of its first token in the sequences that share it: 0 where they begin."""
    end: int
    """Of all that goes on from it: behind its branches and the stems that follow them."""

    @property
    def begins(self) -> bool:
        """Whether its sequences begin with it, so that its tokens see no other stem."""
        return self.position == 0

    @property
    def stop(self) -> int:
        """Behind its own tokens."""
        return self.start + self.length

    @property
    def branches_end(self) -> int:
        return self.stop + sum(self.branch_lengths)


@dataclass(frozen=True)
class Branches:
    """Which tokens of a row see which: each the tokens before it in the sequences that it belongs to."""

    stems: tuple[Stem, ...]
    """In the order of the row. They and their branches fill it."""
    ends: torch.Tensor  # (L,) where a token is seen no more: behind all that goes on from its stem, or its branch
    positions: torch.Tensor  # (L,) in the sequences that the token belongs to

    @classmethod
    def of(cls, stems: Sequence[Stem]) -> Branches:
        """The row that these stems make, at least one."""
        lengths: list[int] = []
        ends: list[int] = []
        positions: list[int] = []
        for stem in stems:
            lengths.extend((stem.length, *stem.branch_lengths))
            ends.append(stem.end)
            ends.extend(list(accumulate(stem.branch_lengths, initial=stem.stop))[1:])
            positions.extend((stem.position, *[stem.position + stem.length] * len(stem.branch_lengths)))
        sizes = torch.tensor(lengths)
        offsets = torch.tensor(positions) - (sizes.cumsum(0) - sizes)
        return cls(
            tuple(stems),
            ends=torch.tensor(ends).repeat_interleave(sizes),
            positions=offsets.repeat_interleave(sizes) + torch.arange(sum(lengths)),
        )

    def sees(self, query: torch.Tensor, key: torch.Tensor, window: int | None = None) -> torch.Tensor:
        """Whether the token at place `query` attends to the one at `key`, less than `window` positions back."""
        visible = (query >= key) & (query < self.ends[key])
        return visible if window is None else visible & (self.positions[query] - self.positions[key] < window)

    def to(self, device: torch.device) -> Branches:
        return Branches(self.stems, to_device(self.ends, device), to_device(self.positions, device))


def branches_of(prompt_lengths: Sequence[int], branch_lengths: Sequence[Sequence[int]]) -> Branches:
    """The row that these prompts, each followed by its branches, make; branches without tokens do not count."""
    stems: list[Stem] = []
    for prompt_length, lengths in zip(prompt_lengths, branch_lengths, strict=True):
        stems.append(lone_stem(stems[-1].end if stems else 0, prompt_length, lengths))
    return Branches.of(stems)


def lone_stem(start: int, length: int, branch_lengths: Sequence[int]) -> Stem:
    """A stem that begins its sequences and has branches alone; those without tokens do not count."""
    fed = tuple(length for length in branch_lengths if length > 0)
    return Stem(start, length, fed, 0, start + length + sum(fed))


@dataclass(frozen=True)
class Tree:
    """Sequences that share their beginnings, as a part of a row."""

    tokens: list[int]
    stems: list[Stem]
    """Where nothing is common to all sequences, several of them begin sequences."""
    paths: list[list[int]]
    """Of each sequence: the places of its tokens in the row."""


@dataclass(frozen=True)
class SortedRows:
    """Sequences sorted by their tokens, so that what begins alike is side by side."""

    rows: list[Sequence[int]]
    order: list[int]
    """Where each stood before."""
    shared: list[int]
    """How many tokens each has in common with the one before it, which is as many as with all before it."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> SortedRows:
        """Sequences of at least one token; there may be none."""
        order = sorted(range(len(rows)), key=lambda place: list(rows[place]))
        ordered = [rows[place] for place in order]
        return cls(ordered, order, [0, *(_common(one, other) for one, other in pairwise(ordered))][: len(rows)])

    @property
    def num_tokens(self) -> int:
        """Tokens of the tree: what is shared counts once."""
        return sum(len(row) - shared for row, shared in zip(self.rows, self.shared, strict=True))

    def within(self, token_budget: int) -> Iterator[list[int]]:
        """Parts whose trees have at most so many tokens, or one sequence: the places where these stood before."""
        part: list[int] = []
        tokens = 0
        for place, row, shared in zip(self.order, self.rows, self.shared, strict=True):
            if part and tokens + len(row) - shared > token_budget:
                yield sorted(part)
                part, tokens = [], 0
            tokens += len(row) - (shared if part else 0)
            part.append(place)
        if part:
            yield sorted(part)

    def tree(self, start: int) -> Tree:
        """The tree, in a row's places from `start` on. Every stem has two branches or stems behind it, or none."""
        ends = [  # of sequences that no other goes on from
            place
            for place, row in enumerate(self.rows)
            if place + 1 == len(self.rows) or self.shared[place + 1] < len(row)
        ]
        rows = [self.rows[place] for place in ends]
        shared = [0, *(self.shared[place + 1] for place in ends[:-1])]
        tokens, stems, grown = _grow(rows, shared, start)
        paths: list[list[int]] = [[] for _ in self.rows]
        bounds = pairwise([0, *(place + 1 for place in ends)])
        for path, (low, high) in zip(grown, bounds, strict=True):
            for place in range(low, high):
                paths[self.order[place]] = path[: len(self.rows[place])]
        return Tree(tokens, stems, paths)


def _grow(
    rows: Sequence[Sequence[int]], shared: Sequence[int], start: int
) -> tuple[list[int], list[Stem], list[list[int]]]:
    """Tokens, stems and paths of sorted rows none of which begins another."""
    tokens: list[int] = []
    stems: list[Stem] = []
    paths: list[list[int]] = [[] for _ in rows]

    def lay(low: int, high: int, depth: int, stop: int) -> None:
        """Add the tokens from `depth` to `stop` of rows that have them in common."""
        first = start + len(tokens)
        tokens.extend(rows[low][depth:stop])
        for path in paths[low:high]:
            path.extend(range(first, first + stop - depth))

    pending = [(0, len(rows), 0)]  # rows that have so many tokens in common with those around them
    while pending:
        low, high, depth = pending.pop()
        stop = min(shared[low + 1 : high], default=len(rows[low]))
        cuts = [low, *(place for place in range(low + 1, high) if shared[place] == stop), high]
        parts = [] if high == low + 1 else list(pairwise(cuts))
        if stop == 0:  # nothing in common at all
            pending.extend((*part, 0) for part in reversed(parts))
            continue
        first = start + len(tokens)
        size = len(rows[low]) - depth + sum(len(rows[i]) - shared[i] for i in range(low + 1, high))
        lay(low, high, depth, stop)
        branches = [part for part in parts if part[1] == part[0] + 1]
        for part in branches:
            lay(*part, stop, len(rows[part[0]]))
        lengths = tuple(len(rows[place]) - stop for place, _ in branches)
        stems.append(Stem(first, stop - depth, lengths, depth, first + size))
        pending.extend((*part, stop) for part in reversed(parts) if part not in branches)
    return tokens, stems, paths


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
