"""FlexAttention's block mask of a shared-prompt row, from what each block of tokens holds.

Pairs of tokens are never formed: the largest tensors are of L and (L / MASK_BLOCK)^2 numbers, where torch's own
way needs several of L^2. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from grpo_cli.algorithm.branches import Branches
from grpo_cli.recipe.limits import MASK_BLOCK, mask_length


def block_mask(branches: Branches, window: int | None) -> BlockMask:
    """What `Branches.sees` says, for a row that is padded to `mask_length`; padding sees itself alone."""
    tokens = len(branches.positions)
    length = mask_length(tokens)
    own_ends = torch.arange(tokens + 1, length + 1, device=branches.ends.device)
    positions = pad(branches.positions, (0, length - tokens))
    padded = Branches(branches.stems, torch.cat([branches.ends, own_ends]), positions)

    def visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return padded.sees(query, key, window)

    some, every = visible_blocks(padded, window)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def visible_blocks(row: Branches, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of queries see something of which blocks of keys, and which see all of it.

    A token is seen by a run of places, from its own to its end. In a row in preorder, whatever of an earlier block
    is seen from a later one is seen by the first token of that: a block of keys has a token that is seen from a
    block of queries if its greatest end is behind the first of these, and is seen whole if its least end is not
    before the last.

    Args:
        row: of a multiple of MASK_BLOCK tokens.
        window: positions that a query sees, its own included; None for all.

    Returns:
        Two (Q, K) bool tensors; the second has no block that the first lacks.
    """
    ends, position = (part.view(-1, MASK_BLOCK) for part in (row.ends, row.positions))  # (Q, MASK_BLOCK)
    firsts = torch.arange(0, len(row.ends), MASK_BLOCK, device=ends.device)[:, None]  # (Q, 1)
    earlier = ends.new_ones(len(ends), len(ends), dtype=torch.bool).tril(-1)
    some = earlier & (ends.amax(1) > firsts)
    every = earlier & (ends.amin(1) >= firsts + MASK_BLOCK)
    if window is not None:
        some &= _nearest(ends, position, firsts) < window
        every &= position.amax(1)[:, None] - position.amin(1) < window
    return some | torch.eye(len(ends), dtype=torch.bool, device=ends.device), every


def _nearest(ends: torch.Tensor, position: torch.Tensor, firsts: torch.Tensor) -> torch.Tensor:
    """(Q, K) positions from a key back to the nearest query that sees any of its block, where one does.

    What the first of the queries sees of the keys are stems on its own path, the last of them the nearest. A query
    of a lower position is on another path, and so one behind the last token that both paths have in common: the
    difference is too small then, but no token sees another of an earlier block less than one position back.
    """
    last_end = ends.flip(1).cummax(1).values  # (K, MASK_BLOCK) the greatest end of a key and those after it
    hidden = torch.searchsorted(last_end, firsts.T.expand(len(ends), -1).contiguous(), right=True)  # (K, Q)
    newest_key = position.gather(1, (MASK_BLOCK - 1 - hidden).clamp(min=0)).T  # (Q, K)
    lowest = position.cummin(1).values  # (Q, MASK_BLOCK) the lowest position of a query and those before it
    seeing = (ends.amax(1) - firsts).clamp(1, MASK_BLOCK)  # (Q, K) queries from the first on that see any key
    return (lowest.gather(1, seeing - 1) - newest_key).clamp(min=1)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 1, Q) number of blocks of keys and (1, 1, Q, K) their numbers first, from (Q, K) bool."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
