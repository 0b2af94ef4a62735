"""Keys and values in memory that is allocated once: a prompt's are kept once for its whole group.

A decoding step reads each prompt's keys and values once for all rows of the group, and each row's own after them;
nothing is concatenated or repeated. Rows that finish make room for waiting groups at once. The host keeps track of
where everything is and how long, and never has to ask the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from grpo_cli.algorithm.branches import branches_of
from grpo_cli.policy.attention import LAYOUT, LayerInputs, RowLayout
from grpo_cli.recipe import limits
from grpo_cli.rollout.embedded.decode_graphs import DecodeGraphs, bucketed
from grpo_cli.rollout.embedded.decode_layout import DecodeLayout, DecodeShape, LayerMemory, grid_cells
from grpo_cli.rollout.embedded.memory import filled_holes, on_device

PREFILL_TOKENS = 8_192
"""Prompt tokens in one forward pass; a longer prompt has one of its own."""


class SharedPromptMemory:
    """Memory for S groups of G rows: W tokens of each prompt and T of each row.

    Args:
        model: computes attention with `shared_prompt_attention`.
        prompts: all prompts of the rollout.
        num_generations: G.
        max_completion_tokens: T + 1: a row's last token is never fed.
        graphs: replay decoding steps, where that is possible.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        max_completion_tokens: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.graphs = graphs
        self.group_size = num_generations
        self.prompt_width = max(map(len, prompts), default=0)
        self.row_width = max(max_completion_tokens - 1, 1)
        tokens = self.prompt_width + num_generations * self.row_width
        self.slots = min(len(prompts), max(1, limits.CACHE_TOKENS // tokens))
        self.layers: dict[int, LayerMemory] = {}
        none = np.zeros(0, dtype=np.int64)
        self.prompt_lengths = none  # (A,) of the groups in memory
        self.group_of = none  # (R,) < A
        self.lengths = none  # (R,) tokens of the row's own
        # The device's copy of what the rows are, at addresses that recorded steps read: their lengths, the lengths
        # of their prompts, their cells in the grid of groups, and their cells in the padded grid.
        capacity = self.slots * num_generations
        self.told = torch.zeros(4, capacity, dtype=torch.long, device=model.device)
        self.fed = torch.zeros(capacity, dtype=torch.long, device=model.device)
        self.has_full_grid = True
        """Whether every cell of the grid holds a row, row i in cell i."""

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
        self._tell_device()
        return torch.cat(logits).repeat_interleave(self.group_size, 0)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """(P, V)"""
        device = self.model.device
        first = len(self.prompt_lengths)
        branches = branches_of([len(prompt) for prompt in prompts], [[]] * len(prompts)).to(device)
        lengths = np.array([len(prompt) for prompt in prompts])
        logits = self._forward(
            torch.tensor([[token for prompt in prompts for token in prompt]], device=device),
            branches.positions[None],
            _PrefillLayout(self, branches, first),
            logits_to_keep=on_device(lengths.cumsum() - 1, device),
        )
        groups = np.arange(first, first + len(prompts))
        self.prompt_lengths = np.concatenate([self.prompt_lengths, lengths])
        self.group_of = np.concatenate([self.group_of, groups.repeat(self.group_size)])
        self.lengths = np.concatenate([self.lengths, np.zeros(len(prompts) * self.group_size, dtype=np.int64)])
        return logits[0]

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Memory.decode`."""
        num_rows, exact = len(tokens), self._shape()
        padded = self._padded(exact)
        logits = None
        if self.graphs is not None:
            self.fed[:num_rows] = tokens
            logits = self.graphs.run(padded, lambda: self._decode(self.fed, self._padded_layout(padded)))
        if logits is None:
            logits = self._decode(tokens, self._layout(exact))
        self.told[0, : padded.rows] += 1
        self.lengths = self.lengths + 1
        return logits[:num_rows]

    def _decode(self, tokens: torch.Tensor, layout: DecodeLayout) -> torch.Tensor:
        """(R, V) for the first R tokens, as many as the layout has rows."""
        positions = layout.prompt_lengths + layout.lengths
        return self._forward(tokens[: layout.shape.rows, None], positions[:, None], layout)[:, -1]

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

    def _shape(self) -> DecodeShape:
        """The sizes of the next step, nothing rounded up."""
        return DecodeShape(
            rows=len(self.group_of),
            groups=len(self.prompt_lengths),
            widest=int(np.bincount(self.group_of).max()),
            prompt_width=int(self.prompt_lengths.max()),
            length=int(self.lengths.max()) + 1,
        )

    def _padded(self, exact: DecodeShape) -> DecodeShape:
        """The sizes of the next step as it is replayed. There are no more rows than cells, so each has its own."""
        if self.graphs is None:
            return exact
        groups = bucketed(exact.groups, 4, self.slots)
        widest = bucketed(exact.widest, 4, self.group_size)
        return DecodeShape(
            rows=bucketed(exact.rows, 8, groups * widest),
            groups=groups,
            widest=widest,
            prompt_width=bucketed(exact.prompt_width, 64, self.prompt_width),
            length=bucketed(exact.length, 64, self.row_width),
        )

    def _layout(self, shape: DecodeShape) -> DecodeLayout:
        """Of a step that is computed directly: without the grid and the mask where the rows need none."""
        lengths, prompt_lengths, cells, _ = self.told[:, : shape.rows]
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        is_ragged = shortest < longest or int(self.prompt_lengths.min()) < shape.prompt_width
        oldest = int((self.prompt_lengths[self.group_of] + self.lengths).max())
        return DecodeLayout(
            shape,
            self.layer,
            lengths,
            prompt_lengths,
            None if self.has_full_grid else cells,
            common_length=longest if shortest == longest else None,
            hides=lambda window: is_ragged or (window is not None and oldest >= window),
        )

    def _padded_layout(self, shape: DecodeShape) -> DecodeLayout:
        """Of a step that is recorded: the same computation for all rows that fit into the shape."""
        lengths, prompt_lengths, _, cells = self.told[:, : shape.rows]
        return DecodeLayout(shape, self.layer, lengths, prompt_lengths, cells)

    def _tell_device(self) -> None:
        """Write what the device must know of the rows. A row that only pads is empty and gets a free cell."""
        if not len(self.group_of):
            return
        exact = self._shape()
        padded = self._padded(exact)
        told = np.zeros((4, padded.rows), dtype=np.int64)
        told[0, : exact.rows] = self.lengths
        told[1, : exact.rows] = self.prompt_lengths[self.group_of]
        told[2, : exact.rows] = cells = grid_cells(self.group_of, exact.widest)
        told[3, : exact.rows] = wider = grid_cells(self.group_of, padded.widest)
        free = np.setdiff1d(np.arange(padded.groups * padded.widest), wider)
        told[3, exact.rows :] = free[: padded.rows - exact.rows]
        self.told[:, : padded.rows] = on_device(told, self.told.device)
        self.has_full_grid = np.array_equal(cells, np.arange(exact.groups * exact.widest))

    def keep(self, places: np.ndarray) -> None:
        """See `Memory.keep`."""
        longest = int(self.lengths.max())
        self._move(places, [part[:, :, :longest] for layer in self.layers.values() for part in layer.rows])
        self.lengths = self.lengths[places]
        group_of = self.group_of[places]
        is_alive = np.zeros(len(self.prompt_lengths), dtype=bool)
        is_alive[group_of] = True
        if not is_alive.all():
            groups = filled_holes(is_alive)
            self._move(groups, [part for layer in self.layers.values() for part in layer.prompts])
            self.prompt_lengths = self.prompt_lengths[groups]
            new_place = np.zeros(len(is_alive), dtype=np.int64)
            new_place[groups] = np.arange(len(groups))
            group_of = new_place[group_of]
        self.group_of = group_of
        self._tell_device()

    def _move(self, places: np.ndarray, buffers: list[torch.Tensor]) -> None:
        """Move entry places[i] of each buffer to i."""
        moved = (places != np.arange(len(places))).nonzero()[0]
        if len(moved):
            targets, sources = on_device(np.stack([moved, places[moved]]), self.told.device)
            for buffer in buffers:
                buffer[targets] = buffer[sources]

    def layer(self, index: int, like: torch.Tensor) -> LayerMemory:
        """The memory of a layer, allocated on first use for keys of such a shape (…, K, L, D) and dtype."""
        if index not in self.layers:
            _, heads, _, head_dim = like.shape
            prompts = (self.slots, heads, self.prompt_width, head_dim)
            rows = (self.slots * self.group_size, heads, self.row_width, head_dim)
            self.layers[index] = LayerMemory(
                # Zeros: places that hold no token are read too, with weight zero, and 0 * NaN would be NaN.
                prompts=(like.new_zeros(prompts), like.new_zeros(prompts)),
                rows=(like.new_zeros(rows), like.new_zeros(rows)),
            )
        return self.layers[index]


class _PrefillLayout(RowLayout):
    """A row of prompts whose keys and values are stored in memory."""

    def __init__(self, owner: SharedPromptMemory, branches: Any, first: int) -> None:
        super().__init__(branches)
        self.owner = owner
        self.first = first

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """See `TokenLayout.attend`."""
        buffers = self.owner.layer(inputs.layer, inputs.key).prompts
        for part, buffer in zip((inputs.key, inputs.value), buffers, strict=True):
            for slot, stem in enumerate(self.branches.stems, start=self.first):
                buffer[slot, :, : stem.length] = part[0, :, stem.start : stem.end]
        return super().attend(inputs)
