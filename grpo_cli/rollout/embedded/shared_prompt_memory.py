"""Keys and values in memory that is allocated once: a prompt's are kept once for its whole group.

A decoding step reads each prompt's keys and values once for all rows of the group, and each row's own after them;
nothing is concatenated or repeated. Rows that finish make room for waiting groups at once. The host keeps track of
where everything is and how long, and never has to ask the GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from grpo_cli.algorithm.branches import Branches, SortedRows
from grpo_cli.policy.attention import LAYOUT, LayerInputs, RowLayout
from grpo_cli.recipe import limits
from grpo_cli.rollout.embedded.decode_graphs import DecodeGraphs, bucketed
from grpo_cli.rollout.embedded.decode_layout import DecodeLayout, DecodeShape, LayerMemory, grid_cells
from grpo_cli.rollout.embedded.extend_layout import ExtendLayout
from grpo_cli.rollout.embedded.memory import filled_holes, on_device
from grpo_cli.rollout.engine import Demand

PREFILL_TOKENS = 8_192
"""Tokens that are read in one forward pass; a longer prompt has one of its own."""


@dataclass
class WaitingRow:
    """A row whose completion may go on."""

    place: int
    """Where it lies."""
    group: int
    """< A."""


class SharedPromptMemory:
    """Memory for S prompts and R rows: W tokens of each prompt and T of each row.

    Args:
        model: computes attention with `shared_prompt_attention`.
        prompt_width: W; it grows where a longer prompt comes.
        demand: of the rollout.
        max_completion_tokens: T + 1: a row's last token is never fed.
        graphs: replay decoding steps, where that is possible.
    """

    def __init__(
        self,
        model: Any,
        prompt_width: int,
        demand: Demand,
        max_completion_tokens: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.graphs = graphs
        self.group_size = demand.group_size
        self.prompt_width = prompt_width
        self.row_width = max(max_completion_tokens - 1, 1)
        rows_of_prompt = math.ceil(demand.completions / demand.groups)
        tokens = self.prompt_width + rows_of_prompt * self.row_width
        self.slots = min(demand.groups, max(1, limits.CACHE_TOKENS // tokens))
        self.layers: dict[int, LayerMemory] = {}
        none = np.zeros(0, dtype=np.int64)
        self.prompt_lengths = none  # (A,) of the groups in memory
        self.group_of = none  # (R,) < A
        self.lengths = none  # (R,) tokens of the row's own
        # The device's copy of what the rows are, at addresses that recorded steps read: their lengths, the lengths
        # of their prompts, their cells in the grid of groups, and their cells in the padded grid.
        self.capacity = capacity = max(self.slots * rows_of_prompt, self.group_size)
        self.waiting: dict[int, WaitingRow] = {}
        self.told = torch.zeros(4, capacity, dtype=torch.long, device=model.device)
        self.fed = torch.zeros(capacity, dtype=torch.long, device=model.device)
        self.has_full_grid = True
        """Whether every cell of the grid holds a row, row i in cell i."""

    def room(self, waiting: Sequence[tuple[int, int]]) -> int:
        """See `Memory.room`."""
        free = self.capacity - len(self.group_of) - len(self.waiting)
        sizes = itertools.accumulate(size for _, size in waiting)
        fitting = sum(rows <= free for rows in sizes)
        return min(fitting, self.slots - len(self.prompt_lengths))

    def prefill(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> torch.Tensor:
        """See `Memory.prefill`."""
        self._widen(max(map(len, prompts)))
        self._move(*self._make_way(len(self.group_of) + sum(counts)), self._row_buffers(self.row_width))
        logits = torch.cat(
            [self._prefill(prompts[part], counts[part]) for part in passes([len(prompt) for prompt in prompts])]
        )
        self._tell_device()
        if len(set(counts)) == 1:
            return logits.repeat_interleave(counts[0], 0)
        return logits[on_device(np.arange(len(counts)).repeat(counts), logits.device)]

    def _prefill(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> torch.Tensor:
        """(P, V). What prompts begin with alike, such as tools that they are told of, is computed once."""
        device = self.model.device
        first = len(self.prompt_lengths)
        tree = SortedRows.of(prompts).tree(0)
        branches = Branches.of(tree.stems).to(device)
        lengths = np.array([len(prompt) for prompt in prompts])
        logits = self._forward(
            torch.tensor([tree.tokens], device=device),
            branches.positions[None],
            _PrefillLayout(self, branches, tree.paths, first),
            logits_to_keep=on_device([path[-1] for path in tree.paths], device),
        )
        groups = np.arange(first, first + len(prompts))
        self.prompt_lengths = np.concatenate([self.prompt_lengths, lengths])
        self.group_of = np.concatenate([self.group_of, groups.repeat(counts)])
        self.lengths = np.concatenate([self.lengths, np.zeros(sum(counts), dtype=np.int64)])
        return logits[0]

    def _widen(self, prompt_width: int) -> None:
        """Have room for a prompt of so many tokens, which may be longer than all that were announced."""
        if prompt_width <= self.prompt_width:
            return
        if self.graphs is not None:
            self.graphs.release()  # recorded steps read where the prompts were
        for index, layer in self.layers.items():
            keys, values = (pad(part, (0, 0, 0, prompt_width - self.prompt_width)) for part in layer.prompts)
            self.layers[index] = replace(layer, prompts=(keys, values))
        self.prompt_width = prompt_width

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
            rows=bucketed(exact.rows, 8, min(groups * widest, self.capacity)),
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

    def keep(self, places: np.ndarray, parked: Mapping[int, int]) -> None:
        """See `Memory.keep`."""
        longest = int(self.lengths.max(initial=0))
        targets, sources = list(range(len(places))), places.tolist()
        for name, place in parked.items():
            row = self.waiting[name] = WaitingRow(self._free_place(), int(self.group_of[place]))
            targets.append(row.place)
            sources.append(place)
        self._move(targets, sources, self._row_buffers(longest))
        self.lengths, self.group_of = self.lengths[places], self.group_of[places]
        self._drop_groups()

    def _free_place(self) -> int:
        """The last one that no waiting row has: at the end they are in nobody's way.

        There are no more rows than places, so no row that is being generated is there once all have moved.
        """
        taken = {row.place for row in self.waiting.values()}
        return next(place for place in reversed(range(self.capacity)) if place not in taken)

    def _make_way(self, end: int) -> tuple[list[int], list[int]]:
        """Targets and sources of the waiting rows that must leave the places before `end`."""
        targets, sources = [], []
        for row in self.waiting.values():
            if row.place < end:
                sources.append(row.place)
                row.place = self._free_place()
                targets.append(row.place)
        return targets, sources

    def _drop_groups(self) -> None:
        """Let go of the prompts that no row reads any more."""
        is_alive = np.zeros(len(self.prompt_lengths), dtype=bool)
        is_alive[self.group_of] = True
        is_alive[[row.group for row in self.waiting.values()]] = True
        if not is_alive.all():
            groups = filled_holes(is_alive)
            buffers = [part for layer in self.layers.values() for part in layer.prompts]
            self._move(range(len(groups)), groups.tolist(), buffers)
            self.prompt_lengths = self.prompt_lengths[groups]
            new_place = np.zeros(len(is_alive), dtype=np.int64)
            new_place[groups] = np.arange(len(groups))
            self.group_of = new_place[self.group_of]
            for row in self.waiting.values():
                row.group = int(new_place[row.group])
        self._tell_device()

    def prompt_length(self, name: int) -> int | None:
        """See `Memory.prompt_length`."""
        row = self.waiting.get(name)
        return None if row is None else int(self.prompt_lengths[row.group])

    def extend(
        self, names: Sequence[int], held: Sequence[int], token_ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """See `Memory.extend`."""
        places = range(len(self.group_of), len(self.group_of) + len(names))
        rows = [self.waiting.pop(name) for name in names]
        targets, sources = self._make_way(places.stop)
        groups = [row.group for row in rows]
        prompt_lengths = self.prompt_lengths[groups].tolist()
        kept = [count - length for count, length in zip(held, prompt_lengths, strict=True)]
        counts = list(map(len, token_ids))
        longest = max(self.row_width if targets else 0, *kept)
        self._move([*targets, *places], [*sources, *(row.place for row in rows)], self._row_buffers(longest))
        logits = []
        for part in passes(counts):
            layout = ExtendLayout(
                self.layer,
                places[part],
                groups[part],
                prompt_lengths[part],
                kept[part],
                counts[part],
                self.model.device,
            )
            tokens = on_device([[token for own in token_ids[part] for token in own]], self.model.device)
            positions = layout.positions[None]
            logits.append(self._forward(tokens, positions, layout, logits_to_keep=layout.ends)[0])
        self.group_of = np.concatenate([self.group_of, groups])
        self.lengths = np.concatenate([self.lengths, np.array(kept) + counts])
        self._tell_device()
        return torch.cat(logits)

    def drop(self, name: int) -> None:
        """See `Memory.drop`."""
        if self.waiting.pop(name, None) is not None:
            self._drop_groups()

    def _row_buffers(self, longest: int) -> list[torch.Tensor]:
        """What rows of at most so many tokens have in each layer."""
        return [part[:, :, :longest] for layer in self.layers.values() for part in layer.rows]

    def _move(self, targets: Sequence[int], sources: Sequence[int], buffers: list[torch.Tensor]) -> None:
        """Copy entry sources[i] of each buffer to targets[i], all at once."""
        moves = np.array([targets, sources])
        moves = moves[:, moves[0] != moves[1]]
        if moves.size:
            to, origin = on_device(moves, self.told.device)
            for buffer in buffers:
                buffer[to] = buffer[origin]

    def layer(self, index: int, like: torch.Tensor) -> LayerMemory:
        """The memory of a layer, allocated on first use for keys of such a shape (…, K, L, D) and dtype."""
        if index not in self.layers:
            _, heads, _, head_dim = like.shape
            prompts = (self.slots, heads, self.prompt_width, head_dim)
            rows = (self.capacity, heads, self.row_width, head_dim)
            self.layers[index] = LayerMemory(
                # Zeros: places that hold no token are read too, with weight zero, and 0 * NaN would be NaN.
                prompts=(like.new_zeros(prompts), like.new_zeros(prompts)),
                rows=(like.new_zeros(rows), like.new_zeros(rows)),
            )
        return self.layers[index]


class _PrefillLayout(RowLayout):
    """A row of prompts whose keys and values are stored in memory."""

    def __init__(
        self, owner: SharedPromptMemory, branches: Branches, paths: Sequence[Sequence[int]], first: int
    ) -> None:
        super().__init__(branches)
        self.owner = owner
        self.places = [on_device(path, owner.model.device) for path in paths]
        """(L,) of each prompt's tokens in the row."""
        self.first = first

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """See `TokenLayout.attend`."""
        buffers = self.owner.layer(inputs.layer, inputs.key).prompts
        for part, buffer in zip((inputs.key, inputs.value), buffers, strict=True):
            for slot, places in enumerate(self.places, start=self.first):
                buffer[slot, :, : len(places)] = part[0, :, places]
        return super().attend(inputs)


def passes(lengths: Sequence[int]) -> Iterator[slice]:
    """Parts of what is read, each of at most PREFILL_TOKENS if it can be."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or sum(lengths[start : end + 1]) > PREFILL_TOKENS:
            yield slice(start, end)
            start = end
