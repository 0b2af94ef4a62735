"""FlexAttention's block mask of a shared-prompt row, from what each block of tokens holds.

Pairs of tokens are never formed: the largest tensors are of L and (L / MASK_BLOCK)^2 numbers, where torch's own
way needs several of L^2. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from grpo_cli.algorithm.packing import Branches
from grpo_cli.recipe.limits import MASK_BLOCK, mask_length


def block_mask(branches: Branches, window: int | None) -> BlockMask:
    """What `Branches.sees` says, for a row that is padded to `mask_length`; padding sees padding."""
    length = mask_length(len(branches.positions))
    padding = (0, length - len(branches.positions))
    padded = Branches(
        branches.groups,
        pad(branches.group_ids, padding, value=-1),
        pad(branches.branch_ids, padding),
        pad(branches.positions, padding),
    )

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

    Groups lie one after the other, and in each the prompt comes first, then branch after branch. So what two
    blocks share is at the end of the earlier and at the start of the later, and a block whose first and last token
    are of one group, or of one branch, is of it as a whole.

    Args:
        row: of a multiple of MASK_BLOCK tokens.
        window: positions that a query sees, its own included; None for all.

    Returns:
        Two (Q, K) bool tensors; the second has no block that the first lacks.
    """
    parts = (row.group_ids, row.branch_ids, row.positions)
    group, branch, position = (part.view(-1, MASK_BLOCK) for part in parts)
    far = len(row.positions)
    first, last = branch[:, 0], branch[:, -1]
    earlier = group.new_ones(len(group), len(group), dtype=torch.bool).tril(-1)
    shared = earlier & (group[:, :1] == group[:, -1])  # the group at the start of Q is the one at the end of K

    def near(newest_query: torch.Tensor, oldest_key: torch.Tensor) -> torch.Tensor | bool:
        return window is None or newest_query[:, None] - oldest_key < window

    in_prompt = (group == group[:, -1:]) & (branch == 0)
    last_of_prompt = torch.where(in_prompt, position, -1).amax(1)
    first_of_group = torch.where(group == group[:, :1], position, far).amin(1)
    sees_branch = (first[:, None] == last) & near(position[:, 0], position[:, -1])
    sees_prompt = (last_of_prompt >= 0) & near(first_of_group, last_of_prompt)
    some = shared & (sees_branch | sees_prompt)

    is_whole = group[:, 0] == group[:, -1]
    first_branch = torch.where(branch == 0, far, branch).amin(1)
    in_branch = (first_branch == last) & (first[:, None] == last) & (last[:, None] == last)
    every = shared & is_whole[:, None] & is_whole & ((last == 0) | in_branch)
    every = every & near(position.amax(1), position.amin(1))
    return some | torch.eye(len(group), dtype=torch.bool, device=group.device), every


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 1, Q) number of blocks of keys and (1, 1, Q, K) their numbers first, from (Q, K) bool."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]
