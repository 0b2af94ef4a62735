"""Keeps the keys and values of the rows that are being generated.

There are R rows, one for each turn that is being generated, in the same order as in the batch: `prefill` adds the
rows of new groups at the end, `keep` drops finished ones. Rows whose completion may go on wait until `extend`
adds them again, behind the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache

from grpo_cli.errors import UserError
from grpo_cli.policy.model import base_model
from grpo_cli.recipe import limits


class Memory(Protocol):
    """Runs the model over new tokens beside the keys and values of old ones."""

    def room(self, waiting: Sequence[tuple[int, int]]) -> int:
        """How many of the waiting groups can be added now; at least one when no row is left.

        Args:
            waiting: tokens of the prompt and rows of each, in the order in which they will be added.
        """
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> torch.Tensor:
        """Add counts[i] rows for prompt i, which is computed once; return their (R_new, V) next logits."""
        ...

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add the (R,) tokens, one to each row; return (R, V) logits of the next."""
        ...

    def keep(self, places: np.ndarray, parked: Mapping[int, int]) -> None:
        """Move row places[i] to i and drop all other rows.

        Args:
            parked: names of rows that wait from now on, if this memory can keep them, and their places.
        """
        ...

    def prompt_length(self, name: int) -> int | None:
        """Tokens of a waiting row's prompt, which stay as they are; None if it does not wait."""
        ...

    def extend(
        self, names: Sequence[int], held: Sequence[int], token_ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Add waiting rows again, behind the others; return their (r, V) next logits.

        Args:
            names: of the rows.
            held: tokens from the beginning, the prompt included, that each of them keeps of what it has read.
            token_ids: what each of them reads after those, at least one token.
        """
        ...

    def drop(self, name: int) -> None:
        """Let go of a waiting row, if there is one of this name."""
        ...


class RowMemory:
    """transformers' own cache, a padded row for each completion: for models that cannot share prompts.

    Such a cache takes no new rows beside old ones, so a set of groups is finished before the next is begun, and
    rows cannot wait: a later turn is computed from its beginning.
    """

    def __init__(self, model: Any, num_generations: int, max_completion_tokens: int) -> None:
        self.model = model
        self.num_generations = num_generations
        self.max_completion_tokens = max_completion_tokens
        self.cache_name = cache_name(model)
        self.cache: Any = None
        self.attention_mask = torch.empty(0, 0)  # (R, W + t)
        self.positions = torch.empty(0)  # (R,) of the next token

    def room(self, waiting: Sequence[tuple[int, int]]) -> int:
        """See `Memory.room`."""
        if len(self.positions):
            return 0
        longest, count, rows = 0, 0, 0
        for prompt_length, size in waiting:
            longest = max(longest, prompt_length)
            rows += size
            if count and rows * (longest + self.max_completion_tokens) > limits.CACHE_TOKENS:
                break
            count += 1
        return count

    def prompt_length(self, name: int) -> int | None:
        """See `Memory.prompt_length`."""
        return None

    def extend(
        self, names: Sequence[int], held: Sequence[int], token_ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """See `Memory.extend`."""
        raise AssertionError("no row of this memory waits")

    def drop(self, name: int) -> None:
        """See `Memory.drop`."""

    def prefill(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> torch.Tensor:
        """See `Memory.prefill`.

        Raises:
            UserError: the model keeps its state in a way of its own.
        """
        device, width = self.model.device, max(len(prompt) for prompt in prompts)
        padded = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        visible = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask = torch.tensor(visible, device=device)  # (P, W)
        output = self.model(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: DynamicCache(config=self.model.config)},
        )
        self.cache = getattr(output, self.cache_name, None)
        if self.cache is None:
            raise UserError(
                f"generation.engine: transformers cannot generate with {type(self.model).__name__}, which does "
                "not hand out its cache; use another model"
            )
        rows = on_device(np.arange(len(prompts)).repeat(counts), device)
        self.cache.reorder_cache(rows)
        self.attention_mask = mask[rows]
        self.positions = mask.sum(-1)[rows]
        logits: torch.Tensor = output.logits[rows, -1]
        return logits

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Memory.decode`."""
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(tokens), 1)], 1)
        output = self.model(
            input_ids=tokens[:, None],
            # Padding is no part of a state, and a mask over it would be taken for one over this token.
            attention_mask=self.attention_mask if self.cache_name == "past_key_values" else None,
            position_ids=self.positions[:, None],
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        self.positions = self.positions + 1
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def keep(self, places: np.ndarray, parked: Mapping[int, int]) -> None:
        """See `Memory.keep`."""
        kept = on_device(places, self.positions.device)
        self.attention_mask = self.attention_mask[kept]
        self.positions = self.positions[kept]
        if len(kept):
            self.cache.reorder_cache(kept)


def cache_name(model: Any) -> str:
    """The argument in which the model takes its cache and the output in which it gives it back."""
    takes_state = "cache_params" in inspect.signature(base_model(model).forward).parameters  # state-space models
    return "cache_params" if takes_state else "past_key_values"


def filled_holes(is_alive: np.ndarray) -> np.ndarray:
    """(K,) places of the K living rows: the last of them fill the holes of dead ones, so that few have to move."""
    alive = is_alive.nonzero()[0]
    places = np.arange(len(alive))
    places[~is_alive[: len(alive)]] = alive[alive >= len(alive)]
    return places


def on_device(values: Any, device: torch.device) -> torch.Tensor:
    """A tensor of these numbers, copied without waiting for a GPU."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
