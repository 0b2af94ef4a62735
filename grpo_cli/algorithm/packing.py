"""From groups of completions to the tensors of one forward pass. Pure functions: no model, no I/O.

A group is computed as one row of tokens `[prompt | completion 1 | … | completion G]`: the completions restart at
the position after the prompt and see the prompt and themselves, so their log-probabilities and gradients are those
of G separate rows at the cost of P + G·T tokens in place of G·(P + T). Several groups share a row. Where rows have
contexts of their own, whatever they begin with alike is there once.

What comes after the last token that the policy sampled predicts nothing, nor does that token: neither is ever fed
to the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, pairwise
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo_cli.algorithm.branches import Branches, SortedRows, Stem, branches_of, lone_stem
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
    sampled: Sequence[Sequence[bool]] | None = None
    """Which tokens of each completion the policy sampled, where others are among them. These alone are
    predicted."""
    prompts: Sequence[Sequence[int]] | None = None
    """What each completion goes on from, at least one token, where that is not always the prompt: a turn after a
    history that was rendered anew. Beginnings in common are computed once, wherever they end."""

    @cached_property
    def fed_lengths(self) -> list[int]:
        """Tokens of each completion that are fed: those before the last one that is predicted."""
        if self.sampled is None:
            return [max(len(completion) - 1, 0) for completion in self.completions]
        return [next((i for i in range(len(row) - 1, 0, -1) if row[i]), 0) for row in self.sampled]

    @property
    def contexts(self) -> Sequence[Sequence[int]]:
        """What each completion goes on from."""
        return [self.prompt] * len(self.completions) if self.prompts is None else self.prompts

    @property
    def rows(self) -> list[list[int]]:
        """What is fed for each completion, its context first."""
        fed = zip(self.contexts, self.completions, self.fed_lengths, strict=True)
        return [[*context, *completion[:length]] for context, completion, length in fed]

    @cached_property
    def shared_tokens(self) -> int:
        """Tokens of input, beginnings in common counted once."""
        if self.prompts is None:
            return len(self.prompt) + sum(self.fed_lengths)
        return SortedRows.of(self.rows).num_tokens

    @property
    def longest_row(self) -> int:
        """Tokens of input of the longest completion, its context included."""
        return max(map(len, self.contexts)) + max(self.fed_lengths)

    def part(self, places: Sequence[int]) -> Group:
        """The group of some of its completions."""
        return Group(
            self.prompt,
            [self.completions[place] for place in places],
            [self.samples[place] for place in places],
            None if self.sampled is None else [self.sampled[place] for place in places],
            None if self.prompts is None else [self.prompts[place] for place in places],
        )


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
    mask: torch.Tensor  # (B, T) bool, True on the N completion tokens that were sampled
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

    A group over the budget is split into parts that each carry what they go on from; a completion is never split,
    so one whose context and tokens exceed the budget has a pack of its own.

    Args:
        groups: of one optimizer step.
        token_budget: tokens of input in a forward pass, padding included.
        shared_prompt: compute what completions begin with alike once; otherwise one padded row for each.
    """
    packs: list[Pack] = []
    pending: list[Group] = []
    parts = [part for group in groups for part in _split(group, token_budget, shared_prompt)]
    if not shared_prompt:
        # Rows of like length share a pack, so that little of it is padding.
        parts.sort(key=lambda part: part.longest_row, reverse=True)
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
    if group.prompts is not None:
        places = range(len(group.samples))
        parts = SortedRows.of(group.rows).within(token_budget) if shared_prompt else ([place] for place in places)
        yield from (group.part(part) for part in parts)
        return
    start = 0
    for end in range(1, len(group.samples) + 1):
        is_last = end == len(group.samples)
        if is_last or _cost([group.part(range(start, end + 1))], shared_prompt) > token_budget:
            yield group.part(range(start, end))
            start = end


def _cost(groups: Sequence[Group], shared_prompt: bool) -> int:
    """Tokens of input that a pack of these groups has."""
    if shared_prompt:
        return sum(group.shared_tokens for group in groups)
    return max(group.longest_row for group in groups) * sum(len(group.completions) for group in groups)


def _build(groups: Sequence[Group], shared_prompt: bool) -> Pack:
    completions = [torch.tensor(completion, dtype=torch.long) for g in groups for completion in g.completions]
    targets = pad_sequence(completions, batch_first=True)  # (B, T)
    lengths = torch.tensor([len(completion) for completion in completions])
    mask = torch.arange(targets.shape[1]) < lengths[:, None]  # (B, T)
    for own, sampled in zip(mask, (row for group in groups for row in _sampled(group)), strict=True):
        if sampled is not None:
            own[: len(sampled)] = torch.tensor(sampled, dtype=torch.bool)
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


def _sampled(group: Group) -> Sequence[Sequence[bool] | None]:
    return [None] * len(group.completions) if group.sampled is None else group.sampled


def _shared_prompt_layout(groups: Sequence[Group]) -> dict[str, Any]:
    tokens: list[int] = []
    stems: list[Stem] = []
    predictors: list[int] = []
    for group in groups:
        lay = _lay_completions if group.prompts is None else _lay_tree
        part, own_stems, places = lay(group, len(tokens))
        tokens.extend(part)
        stems.extend(own_stems)
        for own, completion, sampled in zip(places, group.completions, _sampled(group), strict=True):
            predictors.extend(_predicting(own, completion, sampled))
    branches = Branches.of(stems)
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": branches.positions[None],
        "attention_mask": None,
        "branches": branches,
        "predictors": torch.tensor(predictors, dtype=torch.long),
    }


def _predicting(places: Sequence[int], completion: Sequence[int], sampled: Sequence[bool] | None) -> Iterable[int]:
    """Of the places before a completion's tokens, those before the tokens that are predicted."""
    return places[: len(completion)] if sampled is None else compress(places, sampled)


Laid = tuple[list[int], list[Stem], list[list[int]]]
"""Tokens and stems of a group, and for each completion the places of the tokens that predict its own."""


def _lay_completions(group: Group, start: int) -> Laid:
    tokens = list(group.prompt)
    last_of_prompt = start + len(tokens) - 1
    places = []
    for completion, length in zip(group.completions, group.fed_lengths, strict=True):
        first = start + len(tokens)
        places.append([last_of_prompt, *range(first, first + length)])
        tokens.extend(completion[:length])
    return tokens, [lone_stem(start, len(group.prompt), group.fed_lengths)], places


def _lay_tree(group: Group, start: int) -> Laid:
    tree = SortedRows.of(group.rows).tree(start)
    paths = zip(tree.paths, group.contexts, strict=True)
    return tree.tokens, tree.stems, [path[len(context) - 1 :] for path, context in paths]


def _row_layout(groups: Sequence[Group]) -> dict[str, Any]:
    inputs = [torch.tensor(row) for group in groups for row in group.rows]
    input_ids = pad_sequence(inputs, batch_first=True)  # (R, L)
    lengths = torch.tensor([len(row) for row in inputs])
    position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    predictors: list[int] = []
    rows = (row for g in groups for row in zip(g.contexts, g.completions, _sampled(g), strict=True))
    for number, (context, completion, sampled) in enumerate(rows):
        first = number * input_ids.shape[1] + len(context) - 1
        predictors.extend(_predicting(range(first, first + len(completion)), completion, sampled))
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": (position_ids < lengths[:, None]).long(),
        "branches": None,
        "predictors": torch.tensor(predictors, dtype=torch.long),
    }
