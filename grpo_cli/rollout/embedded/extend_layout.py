"""The attention of rows that read on: several new tokens each, behind what their memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from grpo_cli.policy.attention import LayerInputs
from grpo_cli.rollout.embedded.decode_layout import LayerMemory
from grpo_cli.rollout.embedded.memory import on_device


class ExtendLayout:
    """The `TokenLayout` of one row of M tokens, which holds the new tokens of r rows one after the other.

    A new token sees its group's prompt, what its row holds, and the new ones up to itself.

    Args:
        layer: gives the memory of a layer for keys such as these.
        rows: place of the r rows in memory.
        groups: of each row.
        prompt_lengths: of each row's prompt.
        held: tokens of its own that each row holds.
        counts: new tokens of each row, at least one.
        device: of the model.
    """

    def __init__(
        self,
        layer: Callable[[int, torch.Tensor], LayerMemory],
        rows: Sequence[int],
        groups: Sequence[int],
        prompt_lengths: Sequence[int],
        held: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
    ) -> None:
        self.layer = layer
        steps = np.arange(max(counts))
        owners = np.arange(len(counts)).repeat(counts)  # (M,) < r
        own = np.concatenate([held[i] + np.arange(count) for i, count in enumerate(counts)])  # (M,) within the row
        starts = np.cumsum([0, *counts[:-1]])
        self.length = int(own.max()) + 1
        self.prompt_width = max(prompt_lengths)
        self.positions = on_device(np.array(prompt_lengths)[owners] + own, device)  # (M,)
        self.ends = on_device(starts + np.array(counts) - 1, device)  # (r,) places of the last tokens
        self._rows, self._groups = on_device(np.array(rows), device), on_device(np.array(groups), device)
        self._row_of, self._own = on_device(np.array(rows)[owners], device), on_device(own, device)  # (M,)
        # Queries in a grid of r rows of the longest count, and back; what pads repeats the last token.
        grid = starts[:, None] + np.minimum(steps, np.array(counts)[:, None] - 1)
        self._to_grid = on_device(grid, device)  # (r, S)
        self._from_grid = on_device(owners * len(steps) + own - np.array(held)[owners], device)  # (M,)
        self._prompt_lengths = on_device(np.array(prompt_lengths), device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """See `TokenLayout.attend`."""
        memory = self.layer(inputs.layer, inputs.key)
        keys = self._read(inputs.key, memory.prompts[0], memory.rows[0])
        values = self._read(inputs.value, memory.prompts[1], memory.rows[1])
        queries = inputs.query[0][:, self._to_grid].transpose(0, 1)  # (r, H, S, D)
        mask = self._mask(inputs.window)
        attended = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=inputs.scale, enable_gqa=True
        )
        return attended.transpose(0, 1).flatten(1, 2)[None, :, self._from_grid]

    def _read(self, new: torch.Tensor, prompts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Write the (1, K, M, D) new ones behind what rows hold; return (r, K, W + t, D) of prompts and rows."""
        rows[self._row_of, :, self._own] = new[0].transpose(0, 1)
        read = prompts[self._groups, :, : self.prompt_width], rows[self._rows, :, : self.length]
        return torch.cat(read, 2)

    def _mask(self, window: int | None) -> torch.Tensor:
        """(r, 1, S, W + t), True on what a new token sees."""
        if window not in self._masks:
            device = self._own.device
            prompt_lengths = self._prompt_lengths[:, None]  # (r, 1)
            prompt_places = torch.arange(self.prompt_width, device=device)
            own_places = torch.arange(self.length, device=device)
            in_prompt = (prompt_places < prompt_lengths)[:, None]  # (r, 1, W)
            query = self._own[self._to_grid][:, :, None]  # (r, S, 1)
            mask = torch.cat([in_prompt.expand(-1, query.shape[1], -1), own_places <= query], 2)
            if window is not None:
                key_positions = torch.cat(
                    [prompt_places.expand(len(prompt_lengths), -1), prompt_lengths + own_places], 1
                )
                ages = prompt_lengths[:, :, None] + query - key_positions[:, None]
                mask = mask & (ages < window)
            self._masks[window] = mask[:, None]
        return self._masks[window]
