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
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_cli.algorithm.transfer import to_device


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
class BranchedGroup:
    """Where a group lies in its row: at `start` the prompt, then its branches, what is fed of each completion."""

    start: int
    prompt_length: int
    branch_lengths: tuple[int, ...]
    """Completions that feed nothing are left out."""

    @property
    def branches_start(self) -> int:
        return self.start + self.prompt_length

    @property
    def end(self) -> int:
        return self.branches_start + sum(self.branch_lengths)


@dataclass(frozen=True)
class Branches:
    """Which tokens of a shared-prompt row see which: each its prompt and what came before in its own branch."""

    groups: tuple[BranchedGroup, ...]
    group_ids: torch.Tensor  # (L,)
    branch_ids: torch.Tensor  # (L,) 0 for the prompt, else the completion
    positions: torch.Tensor  # (L,) in the sequence that the token belongs to

    def sees(self, query: torch.Tensor, key: torch.Tensor, window: int | None = None) -> torch.Tensor:
        """Whether the token at place `query` attends to the one at `key`, less than `window` positions back."""
        same_group = self.group_ids[query] == self.group_ids[key]
        same_branch = (self.branch_ids[key] == 0) | (self.branch_ids[query] == self.branch_ids[key])
        visible = same_group & same_branch & (query >= key)
        return visible if window is None else visible & (self.positions[query] - self.positions[key] < window)

    def to(self, device: torch.device) -> Branches:
        parts = (to_device(part, device) for part in (self.group_ids, self.branch_ids, self.positions))
        return Branches(self.groups, *parts)


@dataclass(frozen=True)
class Pack:
    """What one forward pass needs: R rows of L tokens that hold B completions of at most T tokens.

    Places are found when it is built: to look for them on a device would be to wait for it.
    """

    input_ids: torch.Tensor  # (R, L)
    position_ids: torch.Tensor  # (R, L)
    attention_mask: torch.Tensor | None  # (R, L) of plain rows
    branches: Branches | None  # of a shared-prompt row
    predictors: torch.Tensor  # (N,) places in the flattened rows whose hidden states predict completion tokens
    columns: torch.Tensor  # (C,) in which there are predictors, in whatever rows
    column_places: torch.Tensor  # (N,) of each predictor among the C columns
    targets: torch.Tensor  # (B, T) completion token ids, 0 on padding
    mask: torch.Tensor  # (B, T) bool, True on the N completion tokens
    places: torch.Tensor  # (N,) of these in the flattened mask
    samples: torch.Tensor  # (B,) where each completion stands in the step's tensors: on the CPU, where those are

    def to(self, device: torch.device) -> Pack:
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and name != "samples":
                moved[name] = to_device(value, device)
            else:
                moved[name] = value.to(device) if isinstance(value, Branches) else value
        return Pack(**moved)


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


def deal_groups(groups: Sequence[Group], num_hands: int) -> list[list[Group]]:
    """Give each of some ranks its groups, whole, so that all have about as many tokens.

    The longest group goes first, each to the rank with the fewest tokens so far (Graham's rule: at most 4/3 of the
    best deal). Each rank's groups are in the order of `groups`.
    """
    costs = [_cost([group], shared_prompt=True) for group in groups]
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    loads = [0] * num_hands
    for index in sorted(range(len(groups)), key=lambda index: -costs[index]):
        hand = loads.index(min(loads))
        hands[hand].append(index)
        loads[hand] += costs[index]
    return [[groups[index] for index in sorted(hand)] for hand in hands]


def empty_pack(*, shared_prompt: bool) -> Pack:
    """A pack of one token and no completion, for a rank that must run a forward pass and has nothing left."""
    one = torch.zeros(1, 1, dtype=torch.long)
    none = torch.zeros(0, dtype=torch.long)
    return Pack(
        input_ids=one,
        position_ids=one,
        attention_mask=None if shared_prompt else torch.ones_like(one),
        branches=branches_of([1], [[]]) if shared_prompt else None,
        predictors=none,
        columns=none,
        column_places=none,
        targets=torch.zeros(0, 1, dtype=torch.long),
        mask=torch.zeros(0, 1, dtype=torch.bool),
        places=none,
        samples=none,
    )


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
    layout = _shared_prompt_layout(groups) if shared_prompt else _row_layout(groups)
    width = layout["input_ids"].shape[1]
    columns, column_places = torch.unique(layout["predictors"] % width, return_inverse=True)
    return Pack(
        **layout,
        columns=columns,
        column_places=column_places,
        targets=targets,
        mask=mask,
        places=mask.flatten().nonzero().squeeze(1),
        samples=samples,
    )


def _shared_prompt_layout(groups: Sequence[Group]) -> dict[str, Any]:
    tokens: list[int] = []
    predictors: list[int] = []
    for group in groups:
        tokens.extend(group.prompt)
        last_of_prompt = len(tokens) - 1
        for completion in group.completions:
            fed = completion[:-1]
            if completion:
                predictors.extend([last_of_prompt, *range(len(tokens), len(tokens) + len(fed))])
            tokens.extend(fed)
    branches = branches_of(
        [len(group.prompt) for group in groups],
        [[len(completion) - 1 for completion in group.completions] for group in groups],
    )
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": branches.positions[None],
        "attention_mask": None,
        "branches": branches,
        "predictors": torch.tensor(predictors, dtype=torch.long),
    }


def branches_of(prompt_lengths: Sequence[int], branch_lengths: Sequence[Sequence[int]]) -> Branches:
    """The row that these prompts, each followed by its branches, make; branches without tokens do not count."""
    groups: list[BranchedGroup] = []
    positions: list[torch.Tensor] = []
    branch_ids: list[torch.Tensor] = []
    for prompt_length, lengths in zip(prompt_lengths, branch_lengths, strict=True):
        fed = tuple(length for length in lengths if length > 0)
        groups.append(BranchedGroup(groups[-1].end if groups else 0, prompt_length, fed))
        positions.append(torch.arange(prompt_length))
        positions.extend(torch.arange(prompt_length, prompt_length + length) for length in fed)
        numbers = torch.arange(len(fed) + 1)
        branch_ids.append(numbers.repeat_interleave(torch.tensor([prompt_length, *fed])))
    sizes = torch.tensor([group.end - group.start for group in groups])
    return Branches(
        tuple(groups),
        group_ids=torch.arange(len(groups)).repeat_interleave(sizes),
        branch_ids=torch.cat(branch_ids),
        positions=torch.cat(positions),
    )


def _row_layout(groups: Sequence[Group]) -> dict[str, Any]:
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    inputs = [torch.tensor([*prompt, *completion[:-1]]) for prompt, completion in rows]
    input_ids = pad_sequence(inputs, batch_first=True)  # (R, L)
    lengths = torch.tensor([len(row) for row in inputs])
    position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    predictors = [
        torch.arange(len(completion)) + row * input_ids.shape[1] + len(prompt) - 1
        for row, (prompt, completion) in enumerate(rows)
    ]
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": (position_ids < lengths[:, None]).long(),
        "branches": None,
        "predictors": torch.cat(predictors),
    }
