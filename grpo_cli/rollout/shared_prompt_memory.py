"""Keys and values in memory that is laid out once: a prompt's are kept once for its whole group.

A decoding step reads each prompt's keys and values once for all rows of the group, and each row's own behind them;
nothing is concatenated or repeated. Rows that finish make room for waiting groups at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_cli.algorithm.packing import branches_of
from grpo_cli.policy.attention import LAYOUT, LayerInputs, RowLayout
from grpo_cli.rollout import memory

PREFILL_TOKENS = 8_192
"""Prompt tokens in one forward pass; a longer prompt has one of its own."""


class SharedPromptMemory:
    """Memory of S groups of G rows: W tokens for each prompt and T for each row.

    Args:
        model: its kernel is `shared_prompt_attention`.
        prompts: all that will be generated for.
        num_generations: G.
        max_completion_tokens: T + 1: a row's last token is never fed.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], num_generations: int, max_completion_tokens: int
    ) -> None:
        self.model = model
        self.group_size = num_generations
        self.prompt_width = max(map(len, prompts), default=0)
        self.row_width = max(max_completion_tokens - 1, 1)
        tokens = self.prompt_width + num_generations * self.row_width
        self.slots = min(len(prompts), max(1, memory.CACHE_TOKENS // tokens))
        self.layers: dict[int, _LayerMemory] = {}
        device = model.device
        self.prompt_lengths = torch.zeros(0, dtype=torch.long, device=device)  # (A,) of the groups in memory
        self.group_of = torch.zeros(0, dtype=torch.long, device=device)  # (R,) < A
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)  # (R,) tokens of the row's own

    def room(self, waiting: Sequence[Sequence[int]]) -> int:
        """See `Memory.room`."""
        return min(len(waiting), self.slots - len(self.prompt_lengths))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `Memory.prefill`."""
        logits = []
        start = 0
        for end in range(1, len(prompts) + 1):
            if end == len(prompts) or sum(map(len, prompts[start : end + 1])) > PREFILL_TOKENS:
                logits.append(self._prefill(prompts[start:end]))
                start = end
        return torch.cat(logits).repeat_interleave(self.group_size, 0)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(P, V)"""
        device = self.model.device
        first = len(self.prompt_lengths)
        branches = branches_of([len(prompt) for prompt in prompts], [[]] * len(prompts)).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        logits = self._forward(
            torch.tensor([[token for prompt in prompts for token in prompt]], device=device),
            branches.positions[None],
            _PrefillLayout(self, branches, first),
            logits_to_keep=lengths.cumsum(0) - 1,
        )
        groups = torch.arange(first, first + len(prompts), device=device)
        self.prompt_lengths = torch.cat([self.prompt_lengths, lengths])
        self.group_of = torch.cat([self.group_of, groups.repeat_interleave(self.group_size)])
        self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(len(prompts) * self.group_size)])
        return logits[0]

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Memory.decode`."""
        positions = self.prompt_lengths[self.group_of] + self.lengths  # (R,)
        logits = self._forward(tokens[:, None], positions[:, None], _DecodeLayout(self))
        self.lengths = self.lengths + 1
        return logits[:, -1]

    def _forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, layout: Any, **arguments: Any
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=input_ids.new_ones(1, 1, 1, 1),  # handed through as it is: the layout takes its place
            use_cache=False,
            **{LAYOUT: layout},
            **arguments,
        ).logits
        return logits

    def keep(self, places: torch.Tensor) -> None:
        """See `Memory.keep`."""
        longest = int(self.lengths.max())
        _move(places, [part[:, :, :longest] for layer in self.layers.values() for part in layer.rows])
        self.lengths = self.lengths[places]
        group_of = self.group_of[places]
        is_alive = torch.zeros(len(self.prompt_lengths), dtype=torch.bool, device=places.device)
        is_alive[group_of] = True
        if not is_alive.all():
            groups = filled_holes(is_alive)
            _move(groups, [part for layer in self.layers.values() for part in layer.prompts])
            self.prompt_lengths = self.prompt_lengths[groups]
            new_place = torch.empty_like(is_alive, dtype=torch.long)
            new_place[groups] = torch.arange(len(groups), device=places.device)
            group_of = new_place[group_of]
        self.group_of = group_of

    def layer(self, index: int, like: torch.Tensor) -> _LayerMemory:
        """The memory of a layer, made on first use for (…, K, L, D) keys such as these."""
        if index not in self.layers:
            _, heads, _, head_dim = like.shape
            prompts = (self.slots, heads, self.prompt_width, head_dim)
            rows = (self.slots * self.group_size, heads, self.row_width, head_dim)
            self.layers[index] = _LayerMemory(
                # Zeros, as what no token has written to is read too, with weight zero.
                prompts=(like.new_zeros(prompts), like.new_zeros(prompts)),
                rows=(like.new_zeros(rows), like.new_zeros(rows)),
            )
        return self.layers[index]


@dataclass(frozen=True)
class _LayerMemory:
    """Keys and values of one layer."""

    prompts: tuple[torch.Tensor, torch.Tensor]  # two (S, K, W, D)
    rows: tuple[torch.Tensor, torch.Tensor]  # two (S·G, K, T, D)


def filled_holes(is_alive: torch.Tensor) -> torch.Tensor:
    """(K,) places of the K living ones, where the last of them fill the holes, so that few have to move."""
    alive = is_alive.nonzero().squeeze(1)
    places = torch.arange(len(alive), device=alive.device)
    places[~is_alive[: len(alive)]] = alive[alive >= len(alive)]
    return places


def _move(places: torch.Tensor, buffers: list[torch.Tensor]) -> None:
    """Let entry i of each buffer be what entry places[i] was."""
    moved = (places != torch.arange(len(places), device=places.device)).nonzero().squeeze(1)
    if moved.numel():
        for buffer in buffers:
            buffer[moved] = buffer[places[moved]]


class _PrefillLayout(RowLayout):
    """A row of prompts; their keys and values are written to memory on the way."""

    def __init__(self, owner: SharedPromptMemory, branches: Any, first: int) -> None:
        super().__init__(branches)
        self.owner = owner
        self.first = first

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """See `TokenLayout.attend`."""
        buffers = self.owner.layer(inputs.layer, inputs.key).prompts
        for part, buffer in zip((inputs.key, inputs.value), buffers, strict=True):
            for slot, group in enumerate(self.branches.groups, start=self.first):
                buffer[slot, :, : group.prompt_length] = part[0, :, group.start : group.end]
        return super().attend(inputs)


class _DecodeLayout:
    """One new token for each row: it sees its group's prompt, its row and itself.

    The softmax runs over the scores of both parts side by side; (A, Q) is the grid of the A groups and the rows of
    the fullest one, in which a group's rows meet their prompt in one matrix product.
    """

    def __init__(self, owner: SharedPromptMemory) -> None:
        self.owner = owner
        self.num_groups = len(owner.prompt_lengths)
        self.prompt_width = int(owner.prompt_lengths.max())
        lengths, device = owner.lengths, owner.lengths.device
        shortest, longest = int(lengths.min()), int(lengths.max())
        self.length = longest + 1
        self.common_length = longest if shortest == longest else None
        self.rows = torch.arange(len(lengths), device=device)
        order = torch.sort(owner.group_of, stable=True)
        sizes = torch.bincount(owner.group_of, minlength=self.num_groups)
        starts = sizes.cumsum(0) - sizes
        place = torch.empty_like(self.rows)
        place[order.indices] = self.rows - starts[order.values]
        self.widest = int(sizes.max())
        grid = owner.group_of * self.widest + place  # (R,)
        self.grid = None if torch.equal(grid, torch.arange(self.num_groups * self.widest, device=device)) else grid
        self.biases: dict[int | None, torch.Tensor | None] = {}

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """See `TokenLayout.attend`; L is 1."""
        memory_of_layer = self.owner.layer(inputs.layer, inputs.key)
        new = (inputs.key, inputs.value)
        num_rows, heads, _, head_dim = inputs.query.shape
        own_keys, own_values = (
            self._stored(buffer, part) for buffer, part in zip(memory_of_layer.rows, new, strict=True)
        )  # (R, K, t, D)
        prompt_keys, prompt_values = (
            buffer[: self.num_groups, :, : self.prompt_width] for buffer in memory_of_layer.prompts
        )  # (A, K, W, D)
        queries = (inputs.query * inputs.scale).unflatten(1, (own_keys.shape[1], -1)).squeeze(3)  # (R, K, H/K, D)
        prompt_scores = self._to_rows(self._to_grid(queries) @ prompt_keys.mT)  # (R, K, H/K, W)
        scores = torch.cat([prompt_scores, queries @ own_keys.mT], -1).float()
        bias = self._bias(inputs.window)
        weights = (scores if bias is None else scores + bias).softmax(-1).to(inputs.value.dtype)
        prompt_weights, own_weights = weights.split([prompt_scores.shape[-1], self.length], -1)
        attended = self._to_rows(self._to_grid(prompt_weights) @ prompt_values) + own_weights @ own_values
        return attended.reshape(num_rows, heads, 1, head_dim)

    def _stored(self, buffer: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Write each row's (K, 1, D) behind what it has; return all rows up to the longest."""
        if self.common_length is not None:
            buffer[: len(self.rows), :, self.common_length] = part[:, :, 0]
        else:
            buffer[self.rows, :, self.owner.lengths] = part[:, :, 0]
        return buffer[: len(self.rows), :, : self.length]

    def _to_grid(self, values: torch.Tensor) -> torch.Tensor:
        """(R, K, H/K, X) to (A, K, Q·H/K, X)."""
        if self.grid is not None:
            cells = values.new_zeros(self.num_groups * self.widest, *values.shape[1:])
            values = cells.index_copy_(0, self.grid, values)
        return values.unflatten(0, (self.num_groups, self.widest)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(A, K, Q·H/K, X) to (R, K, H/K, X)."""
        rows = values.unflatten(2, (self.widest, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.grid is None else rows[self.grid]

    def _bias(self, window: int | None) -> torch.Tensor | None:
        """(R, 1, 1, W + t), minus infinity on what a row must not see; None if it may see everything."""
        if window not in self.biases:
            owner = self.owner
            prompt_lengths = owner.prompt_lengths[owner.group_of][:, None]  # (R, 1)
            lengths = owner.lengths[:, None]
            prompt_places = torch.arange(self.prompt_width, device=lengths.device)
            own_places = torch.arange(self.length, device=lengths.device)
            hidden = torch.cat([prompt_places >= prompt_lengths, own_places > lengths], 1)  # (R, W + t)
            if window is not None:
                prompt_ages = prompt_lengths + lengths - prompt_places
                hidden |= torch.cat([prompt_ages, lengths - own_places], 1) >= window
            bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -math.inf)
            self.biases[window] = bias[:, None, None] if hidden.any() else None
        return self.biases[window]
