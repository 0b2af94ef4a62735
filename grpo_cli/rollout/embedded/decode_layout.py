"""The attention of a decoding step over shared prompts: one new token for each row.

The new token sees its group's prompt, its own row and itself. The host knows all sizes beforehand, so it never
waits for the GPU. Sizes may be rounded up; places that hold no token are then masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from grpo_cli.policy.attention import LayerInputs


@dataclass(frozen=True)
class DecodeShape:
    """The sizes of a decoding step."""

    rows: int
    """R."""
    groups: int
    """A."""
    widest: int
    """Q, the rows of the fullest group."""
    prompt_width: int
    """W, the tokens of the longest prompt."""
    length: int
    """t, the tokens of the longest row, the new one included."""


@dataclass(frozen=True)
class LayerMemory:
    """Keys and values of one layer, for S prompts and N rows."""

    prompts: tuple[torch.Tensor, torch.Tensor]  # two (S, K, W, D)
    rows: tuple[torch.Tensor, torch.Tensor]  # two (N, K, T, D)


def grid_cells(group_of: np.ndarray, widest: int) -> np.ndarray:
    """(R,) the cell of each row in a grid of `widest` cells for each group, taken in order."""
    order = group_of.argsort(kind="stable")
    sizes = np.bincount(group_of)
    starts = sizes.cumsum() - sizes
    place = np.empty_like(group_of)
    place[order] = np.arange(len(group_of)) - starts[group_of[order]]
    cells: np.ndarray = group_of * widest + place
    return cells


class DecodeLayout:
    """The `TokenLayout` of a step.

    One softmax runs over the scores of the prompt and of the row side by side. For the prompt's part the rows are
    laid out in an (A, Q) grid of A groups and the Q rows of the fullest one, so that one matrix product multiplies
    all rows of a group with their prompt.

    Args:
        shape: of the step.
        layer: gives the memory of a layer for keys such as these.
        lengths: (R,) tokens of the row's own so far.
        prompt_lengths: (R,) of the row's prompt.
        cells: (R,) of the grid, all of them different; None where row i has cell i and none is empty.
        common_length: what all of `lengths` are, if they are known to be the same.
        hides: whether a mask is needed, given a layer's window.
    """

    def __init__(
        self,
        shape: DecodeShape,
        layer: Callable[[int, torch.Tensor], LayerMemory],
        lengths: torch.Tensor,
        prompt_lengths: torch.Tensor,
        cells: torch.Tensor | None,
        *,
        common_length: int | None = None,
        hides: Callable[[int | None], bool] = lambda window: True,
    ) -> None:
        self.shape = shape
        self.layer = layer
        self.lengths = lengths
        self.prompt_lengths = prompt_lengths
        self.cells = cells
        self.common_length = common_length
        self.hides = hides
        self.rows = torch.arange(shape.rows, device=lengths.device)
        self.biases: dict[int | None, torch.Tensor | None] = {}

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """See `TokenLayout.attend`; L is 1."""
        memory_of_layer = self.layer(inputs.layer, inputs.key)
        new = (inputs.key, inputs.value)
        num_rows, heads, _, head_dim = inputs.query.shape
        own_keys, own_values = (
            self._stored(buffer, part) for buffer, part in zip(memory_of_layer.rows, new, strict=True)
        )  # (R, K, t, D)
        prompt_keys, prompt_values = (
            buffer[: self.shape.groups, :, : self.shape.prompt_width] for buffer in memory_of_layer.prompts
        )  # (A, K, W, D)
        queries = (inputs.query * inputs.scale).unflatten(1, (own_keys.shape[1], -1)).squeeze(3)  # (R, K, H/K, D)
        prompt_scores = self._to_rows(self._to_grid(queries) @ prompt_keys.mT)  # (R, K, H/K, W)
        scores = torch.cat([prompt_scores, queries @ own_keys.mT], -1).float()
        bias = self._bias(inputs.window)
        weights = (scores if bias is None else scores + bias).softmax(-1).to(inputs.value.dtype)
        prompt_weights, own_weights = weights.split([prompt_scores.shape[-1], self.shape.length], -1)
        attended = self._to_rows(self._to_grid(prompt_weights) @ prompt_values) + own_weights @ own_values
        return attended.reshape(num_rows, heads, 1, head_dim)

    def _stored(self, buffer: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Write each row's (K, 1, D) behind what it has; return all rows up to the longest."""
        if self.common_length is not None:
            buffer[: self.shape.rows, :, self.common_length] = part[:, :, 0]
        else:
            buffer[self.rows, :, self.lengths] = part[:, :, 0]
        return buffer[: self.shape.rows, :, : self.shape.length]

    def _to_grid(self, values: torch.Tensor) -> torch.Tensor:
        """(R, K, H/K, X) to (A, K, Q·H/K, X)."""
        if self.cells is not None:
            grid = values.new_zeros(self.shape.groups * self.shape.widest, *values.shape[1:])
            values = grid.index_copy_(0, self.cells, values)
        return values.unflatten(0, (self.shape.groups, self.shape.widest)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(A, K, Q·H/K, X) to (R, K, H/K, X)."""
        rows = values.unflatten(2, (self.shape.widest, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.cells is None else rows[self.cells]

    def _bias(self, window: int | None) -> torch.Tensor | None:
        """(R, 1, 1, W + t), minus infinity on what a row must not see; None if it may see everything."""
        if window not in self.biases:
            self.biases[window] = self._computed_bias(window) if self.hides(window) else None
        return self.biases[window]

    def _computed_bias(self, window: int | None) -> torch.Tensor:
        prompt_lengths, lengths = self.prompt_lengths[:, None], self.lengths[:, None]  # (R, 1)
        prompt_places = torch.arange(self.shape.prompt_width, device=lengths.device)
        own_places = torch.arange(self.shape.length, device=lengths.device)
        hidden = torch.cat([prompt_places >= prompt_lengths, own_places > lengths], 1)  # (R, W + t)
        if window is not None:
            prompt_ages = prompt_lengths + lengths - prompt_places
            hidden |= torch.cat([prompt_ages, lengths - own_places], 1) >= window
        bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -math.inf)
        return bias[:, None, None]
