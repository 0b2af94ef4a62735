"""From groups of completions to the tensors of one forward pass. Pure functions: no model, no I/O.

A group is computed as one row of tokens `[prompt | completion 1 | … | completion G]`: the completions restart at
the position after the prompt and see the prompt and themselves, so their log-probabilities and gradients are those
of G separate rows at the cost of P + G·T tokens in place of G·(P + T). Several groups share a row.

The last token of a completion predicts nothing, so it is never fed to the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Group:
    """A prompt and (some of) its completions."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    completions: Sequence[Sequence[int]]
    """Token ids of each completion."""
    samples: Sequence[int]
    """Where each completion stands in the step's tensors."""


@dataclass(frozen=True)
class Pack:
    """What one forward pass needs: R rows of L tokens that hold B completions of at most T tokens."""

    input_ids: torch.Tensor  # (R, L)
    position_ids: torch.Tensor  # (R, L)
    attention_mask: torch.Tensor  # (1, 1, L, L) bool, or (R, L) for plain rows
    predictors: torch.Tensor  # (N,) or (R, T): positions in a row whose logits predict completion tokens
    targets: torch.Tensor  # (B, T) completion token ids, 0 on padding
    mask: torch.Tensor  # (B, T) bool, True on completion tokens
    samples: torch.Tensor  # (B,) where each completion stands in the step's tensors

    def to(self, device: torch.device) -> Pack:
        return Pack(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def plan_minibatches(num_groups: int, optimizer_steps: int) -> list[range]:
    """The groups of each optimizer step in a pass over the rollout: parts as equal as can be."""
    bounds = [num_groups * part // optimizer_steps for part in range(optimizer_steps + 1)]
    return [range(start, end) for start, end in pairwise(bounds)]


def pack_groups(groups: Sequence[Group], token_budget: int, *, shared_prompt: bool = True) -> list[Pack]:
    """Fill packs with groups in order, each up to `token_budget` tokens of input.

    A group over the budget is split into parts that each carry the prompt; a completion is never split, so one
    whose prompt and tokens exceed the budget has a pack of its own.

    Args:
        groups: of one optimizer step.
        token_budget: tokens of input in a forward pass, padding included.
        shared_prompt: pack completions behind one copy of their prompt; otherwise one padded row for each.
    """
    packs: list[Pack] = []
    pending: list[Group] = []
    parts = [part for group in groups for part in _split(group, token_budget, shared_prompt)]
    if not shared_prompt:
        # Rows of like length share a pack, so that little of it is padding.
        parts.sort(key=lambda part: len(part.prompt) + _longest(part), reverse=True)
    for part in parts:
        if pending and _cost([*pending, part], shared_prompt) > token_budget:
            packs.append(_build(pending, shared_prompt))
            pending = []
        pending.append(part)
    if pending:
        packs.append(_build(pending, shared_prompt))
    return packs


def _split(group: Group, token_budget: int, shared_prompt: bool) -> Iterator[Group]:
    start = 0
    for end in range(1, len(group.samples) + 1):
        is_last = end == len(group.samples)
        if is_last or _cost([_part(group, start, end + 1)], shared_prompt) > token_budget:
            yield _part(group, start, end)
            start = end


def _part(group: Group, start: int, end: int) -> Group:
    return Group(group.prompt, group.completions[start:end], group.samples[start:end])


def _longest(group: Group) -> int:
    return max((len(completion) for completion in group.completions), default=0)


def _cost(groups: Sequence[Group], shared_prompt: bool) -> int:
    """Tokens of input that a pack of these groups has."""
    if shared_prompt:
        return sum(
            len(group.prompt) + sum(max(len(completion) - 1, 0) for completion in group.completions)
            for group in groups
        )
    width = max(len(group.prompt) + max(_longest(group) - 1, 0) for group in groups)
    return width * sum(len(group.completions) for group in groups)


def _build(groups: Sequence[Group], shared_prompt: bool) -> Pack:
    completions = [torch.tensor(completion, dtype=torch.long) for g in groups for completion in g.completions]
    targets = pad_sequence(completions, batch_first=True)  # (B, T)
    lengths = torch.tensor([len(completion) for completion in completions])
    mask = torch.arange(targets.shape[1]) < lengths[:, None]  # (B, T)
    samples = torch.tensor([sample for group in groups for sample in group.samples])
    layout = _shared_prompt_layout if shared_prompt else _row_layout
    return Pack(*layout(groups), targets=targets, mask=mask, samples=samples)


def _shared_prompt_layout(
    groups: Sequence[Group],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    group_of: list[int] = []
    branch_of: list[int] = []  # 0 for the prompt, else the completion
    for group_index, group in enumerate(groups):
        prompt_length = len(group.prompt)
        tokens.extend(group.prompt)
        positions.extend(range(prompt_length))
        branch_of.extend([0] * prompt_length)
        last_of_prompt = len(tokens) - 1
        for branch, completion in enumerate(group.completions, start=1):
            fed = completion[:-1]
            if completion:
                predictors.extend([last_of_prompt, *range(len(tokens), len(tokens) + len(fed))])
            tokens.extend(fed)
            positions.extend(range(prompt_length, prompt_length + len(fed)))
            branch_of.extend([branch] * len(fed))
        group_of.extend([group_index] * (len(tokens) - len(group_of)))
    group_ids, branch_ids = torch.tensor(group_of), torch.tensor(branch_of)
    same_group = group_ids[:, None] == group_ids
    same_branch = (branch_ids == 0) | (branch_ids[:, None] == branch_ids)
    attends = same_group & same_branch & torch.ones_like(same_group).tril()  # (L, L) query, key
    return (
        torch.tensor([tokens]),
        torch.tensor([positions]),
        attends[None, None],
        torch.tensor(predictors, dtype=torch.long),
    )


def _row_layout(groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    inputs = [torch.tensor([*prompt, *completion[:-1]]) for prompt, completion in rows]
    input_ids = pad_sequence(inputs, batch_first=True)  # (R, L)
    lengths = torch.tensor([len(row) for row in inputs])
    position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    width = max(len(completion) for _, completion in rows)
    first = torch.tensor([len(prompt) - 1 for prompt, _ in rows])
    predictors = (first[:, None] + torch.arange(width)).clamp(max=input_ids.shape[1] - 1)  # (R, T)
    return input_ids, position_ids, (position_ids < lengths[:, None]).long(), predictors
