"""Groups whose rows are trees: turns with contexts of their own, some of their tokens not sampled."""

from __future__ import annotations

import random
from collections.abc import Iterator

from grpo_cli.algorithm.branches import Branches
from grpo_cli.algorithm.packing import Group, pack_groups

VOCABULARY = 97


def tree_groups(seed: int, *, depth: int = 4, longest: int = 5, rooted: bool = True) -> list[Group]:
    """A group of rows that are the paths of a random tree, and some that end inside of others, and a plain group.

    Args:
        seed: of all that is random.
        depth: segments of the longest paths.
        longest: tokens of a segment.
        rooted: all rows of the tree have a beginning in common.
    """
    draw = random.Random(seed)
    rows = [row for _ in range(1 if rooted else 2) for row in _paths(draw, depth, longest)]
    rows += [row[: draw.randint(2, len(row))] for row in draw.sample(rows, 2)]
    rows.append(list(rows[0]))
    draw.shuffle(rows)
    prompts, completions, sampled = [], [], []
    for row in rows:
        cut = draw.randint(1, len(row))
        prompts.append(row[:cut])
        completions.append([*row[cut:], draw.randrange(VOCABULARY)])
        sampled.append([draw.random() < 0.6 for _ in completions[-1]])
    sampled[0] = [False] * len(sampled[0])
    tree = Group(prompts[0], completions, range(len(rows)), sampled, prompts)
    turns = [_tokens(draw, 4), _tokens(draw, 1), _tokens(draw, 6)]
    partly = [[True, False, False, True], [True], [True, False, True, True, False, False]]
    return [tree, Group(_tokens(draw, 3), turns, range(len(rows), len(rows) + 3), partly)]


def _paths(draw: random.Random, depth: int, longest: int) -> Iterator[list[int]]:
    segment = _tokens(draw, draw.randint(1, longest))
    if depth == 1:
        yield segment
        return
    first = draw.sample(range(VOCABULARY), 3)
    for number in range(draw.randint(2, 3)):
        deeper = depth - 1 if number == 0 else draw.randint(1, depth - 1)
        for path in _paths(draw, deeper, longest):
            yield [*segment, first[number], *path]


def _tokens(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(VOCABULARY) for _ in range(length)]


def tree_row(seed: int, *, longest: int, depth: int = 4) -> Branches:
    """How the tokens of a pack of such groups see each other."""
    groups = tree_groups(seed, depth=depth, longest=longest, rooted=seed % 3 > 0)
    (pack,) = pack_groups([Group(g.prompt, g.completions, g.samples, None, g.prompts) for g in groups], 10**6)
    assert pack.branches is not None
    return pack.branches


def depth_of(branches: Branches) -> int:
    """Segments of the longest path: stems, and a branch where there is one."""
    depths: dict[int, int] = {}
    for number, stem in enumerate(branches.stems):
        above = [depths[i] for i, other in enumerate(branches.stems[:number]) if stem.end <= other.end]
        depths[number] = 1 + max(above, default=0)
    return max(depth + bool(branches.stems[number].branch_lengths) for number, depth in depths.items())


def sampled_of(group: Group) -> list[list[bool]]:
    """Which tokens of each completion were sampled, whatever the group says of it."""
    if group.sampled is None:
        return [[True] * len(completion) for completion in group.completions]
    return [list(row) for row in group.sampled]


def distinct_beginnings(rows: list[list[int]]) -> int:
    """How many tokens there are to compute."""
    return len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})
