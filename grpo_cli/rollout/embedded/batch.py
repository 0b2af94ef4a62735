"""Turns while they are generated: tokens are drawn on the device; the host decides where turns end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from grpo_cli.errors import RunError
from grpo_cli.recipe.sampling import Sampling
from grpo_cli.rollout.embedded.memory import filled_holes, on_device
from grpo_cli.rollout.embedded.sampling import logits_processors, sample_tokens
from grpo_cli.rollout.engine import Turn

LOOK_EVERY = {"cpu": 1}
"""Steps after which the host looks at the tokens that were drawn, by kind of device."""

LOOK_EVERY_ELSEWHERE = 8
"""Fewer looks, as the host waits for the GPU at each. What a row has drawn after its end is dropped."""

NO_DISTRIBUTION = (
    "generation: for token {place} of a completion the model's output is NaN or infinite. Its weights are "
    "damaged, were trained with too high a learning rate, or overflow in the precision that they are computed in: "
    "look at model.name and model.compute_dtype, or raise a generation.temperature close to 0"
)


@dataclass
class Row:
    """A turn and what was drawn for it."""

    turn: Turn
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: Literal["stop", "length"] | None = None

    @property
    def room(self) -> int:
        """Tokens that it may still draw."""
        return self.turn.max_tokens - len(self.tokens)


class Batch:
    """The R rows that are being generated.

    Args:
        sampling: how tokens are drawn, and how many at most.
        ends: whether a turn ends with the last of these tokens.
        device: that tokens are drawn on.
    """

    def __init__(self, sampling: Sampling, ends: Callable[[list[int]], bool], device: torch.device) -> None:
        self.sampling = sampling
        self.ends = ends
        self.device = device
        self.width = sampling.max_completion_tokens
        self.look_every = LOOK_EVERY.get(device.type, LOOK_EVERY_ELSEWHERE)
        self.processors = logits_processors(sampling)
        self.rows: list[Row] = []
        self.unseen: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(R,) tokens and log-probabilities of each step that the host has not looked at."""
        none = torch.zeros(0, dtype=torch.long, device=device)
        self.places = none  # (R,) of the next token
        self.last = none  # (R,) tokens that were drawn last
        self.uniforms = torch.zeros(0, self.width, dtype=torch.float64, device=device)  # (R, T)
        # For a repetition penalty: what was read, padded with its first token, and what was drawn.
        self.read = self.drawn = none[:, None]  # (R, W), (R, T)

    def begin(self, logits: torch.Tensor, turns: Sequence[Turn]) -> None:
        """Add rows at the end and draw the first token of each, seen by the host at once."""
        first, count = len(self.rows), len(turns)
        self.rows += map(Row, turns)
        uniforms = np.zeros((count, self.width))
        for index, turn in enumerate(turns):
            uniforms[index, : turn.max_tokens] = turn.uniforms()
        self.uniforms = torch.cat([self.uniforms, on_device(uniforms, self.device)])
        self.places = torch.cat([self.places, self.places.new_zeros(count)])
        if self.sampling.repetition_penalty != 1:
            self._note_what_was_read(turns)
        tokens, logprobs = self._draw(logits, slice(first, None), longest=0)
        self._take(self.rows[first:], tokens[:, None], logprobs[:, None])
        self.places[first:] += 1
        self.last = torch.cat([self.last, tokens])

    def _note_what_was_read(self, turns: Sequence[Turn]) -> None:
        width = max(self.read.shape[1], *(len(turn.token_ids) for turn in turns))
        # No other token may be penalised, so padding repeats one that was read.
        padded = [[turn.token_ids[0]] * (width - len(turn.token_ids)) + list(turn.token_ids) for turn in turns]
        added = on_device(padded, self.device)
        before = self.read
        if len(before):
            before = torch.cat([before[:, :1].expand(-1, width - before.shape[1]), before], 1)
        self.read = torch.cat([before, added]) if len(before) else added
        self.drawn = torch.cat([self.drawn.expand(-1, self.width), added.new_zeros(len(turns), self.width)])

    def append(self, logits: torch.Tensor) -> None:
        """Draw the next token of every row from its logits."""
        longest = max(len(row.tokens) for row in self.rows) + len(self.unseen)
        tokens, logprobs = self._draw(logits, slice(None), longest)
        self.unseen.append((tokens, logprobs))
        self.places = self.places + 1
        self.last = tokens

    def must_look(self) -> bool:
        """Whether enough steps have passed, or a row cannot grow."""
        return len(self.unseen) >= min(self.look_every, *(row.room for row in self.rows))

    def _draw(self, logits: torch.Tensor, rows: slice, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(r,) tokens and log-probabilities for r rows, of which the longest has `longest` tokens."""
        places = self.places[rows]
        uniforms = self.uniforms[rows].gather(1, places[:, None]).squeeze(1)
        history = self.read[:0]
        if self.sampling.repetition_penalty != 1:
            read, drawn = self.read[rows], self.drawn[rows]
            is_own = torch.arange(longest, device=self.device) < places[:, None]
            history = torch.cat([read, torch.where(is_own, drawn[:, :longest], read[:, :1])], 1)
        tokens, logprobs = sample_tokens(logits, uniforms, self.sampling.temperature, self.processors, history)
        if self.sampling.repetition_penalty != 1:
            drawn.scatter_(1, places[:, None], tokens[:, None])  # a slice: what is written stays in `drawn`
        return tokens, logprobs

    def _take(self, rows: Sequence[Row], tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Add the (r, k) tokens that r rows have drawn to their turns, each up to its end.

        Raises:
            RunError: a token was drawn from numbers that are no distribution.
        """
        for row, drawn, their_logprobs in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            for token, logprob in zip(drawn, their_logprobs, strict=True):
                if not math.isfinite(logprob):
                    raise RunError(NO_DISTRIBUTION.format(place=len(row.tokens) + 1))
                row.tokens.append(token)
                row.logprobs.append(logprob)
                if self.ends(row.tokens):
                    row.reason = "stop"
                elif not row.room:
                    row.reason = "length"
                if row.reason is not None:
                    break

    def retire(self) -> tuple[list[int], np.ndarray]:
        """Look at the tokens that were drawn, and find the rows that have finished.

        Returns:
            The places of the finished rows, and those of the rows that stay, as `keep` takes them.
        """
        if self.unseen:
            tokens, logprobs = (torch.stack(part, 1) for part in zip(*self.unseen, strict=True))
            self.unseen.clear()
            self._take(self.rows, tokens, logprobs)
        is_alive = np.array([row.reason is None for row in self.rows], dtype=bool)
        return (~is_alive).nonzero()[0].tolist(), filled_holes(is_alive)

    def keep(self, places: np.ndarray) -> None:
        """Move row places[i] to i and drop all other rows."""
        self.rows = [self.rows[place] for place in places]
        kept = on_device(places, self.device)
        self.places, self.last, self.uniforms = self.places[kept], self.last[kept], self.uniforms[kept]
        if self.sampling.repetition_penalty != 1:
            self.read, self.drawn = self.read[kept], self.drawn[kept]
