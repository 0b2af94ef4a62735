"""Completions while they are generated: tokens are drawn on the device; the host decides where completions end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from grpo_cli.errors import RunError
from grpo_cli.recipe.sampling import Sampling
from grpo_cli.rollout.embedded.memory import filled_holes, on_device
from grpo_cli.rollout.embedded.sampling import logits_processors, sample_tokens
from grpo_cli.rollout.engine import SampleKey, sample_uniforms

LOOK_EVERY = {"cpu": 1}
"""Steps after which the host looks at the tokens that were drawn, by kind of device."""

LOOK_EVERY_ELSEWHERE = 8
"""Fewer looks, as the host waits for the GPU at each. What a row has drawn after its end is dropped."""

NO_DISTRIBUTION = (
    "generation: for token {place} of a completion the model's output is NaN or infinite. Its weights are "
    "damaged, were trained with too high a learning rate, or overflow in the precision that they are computed in: "
    "look at model.name and model.compute_dtype, or raise a generation.temperature close to 0"
)


class Batch:
    """N completions, of which R are being generated.

    Args:
        prompts: token ids of each.
        keys: of each prompt's randomness.
        num_generations: completions of each prompt.
        sampling: how tokens are drawn, and how many at most.
        ends: whether a completion ends with the last of these tokens.
        device: that tokens are drawn on.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        num_generations: int,
        sampling: Sampling,
        ends: Callable[[list[int]], bool],
        device: torch.device,
    ) -> None:
        self.sampling = sampling
        self.ends = ends
        self.device = device
        self.group_size = num_generations
        self.limit = sampling.max_completion_tokens
        self.look_every = LOOK_EVERY.get(device.type, LOOK_EVERY_ELSEWHERE)
        self.processors = logits_processors(sampling)
        count = len(prompts) * num_generations
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.reasons: list[Literal["stop", "length"] | None] = [None] * count
        self.rows: list[int] = []  # R of the N
        self.longest = 0  # tokens of the longest row, not counting `unseen`
        self.unseen: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(R,) tokens and log-probabilities of each step that the host has not looked at."""
        uniforms = [sample_uniforms(key, sample, self.limit) for key in keys for sample in range(num_generations)]
        self.uniforms = torch.from_numpy(np.array(uniforms).reshape(count, self.limit)).to(device)  # (N, T)
        none = torch.zeros(0, dtype=torch.long, device=device)
        self.row_ids = none  # (R,) as `rows`
        self.places = none  # (R,) of the next token
        self.last = none  # (R,) tokens that were drawn last
        # For a repetition penalty. Prompts are padded with their first token: no other token may be penalised.
        self.history = self.drawn = torch.zeros(count, 0, dtype=torch.long, device=device)  # (N, W), (N, T)
        if sampling.repetition_penalty != 1:
            width = max((len(prompt) for prompt in prompts), default=0)
            padded = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
            history = torch.tensor(padded, dtype=torch.long, device=device).view(len(prompts), width)
            self.history = history.repeat_interleave(num_generations, 0)
            self.drawn = torch.zeros(count, self.limit, dtype=torch.long, device=device)

    def begin(self, logits: torch.Tensor, groups: Sequence[int]) -> None:
        """Add the rows of these groups at the end and draw the first token of each, seen by the host at once."""
        size = self.group_size
        added = [row for group in groups for row in range(group * size, (group + 1) * size)]
        row_ids = on_device(added, self.device)
        places = torch.zeros_like(row_ids)
        tokens, logprobs = self._draw(logits, row_ids, places, 0)
        self._take(added, tokens[:, None], logprobs[:, None])
        self._set_rows(self.rows + added)
        self.row_ids = torch.cat([self.row_ids, row_ids])
        self.places = torch.cat([self.places, places + 1])
        self.last = torch.cat([self.last, tokens])

    def append(self, logits: torch.Tensor) -> None:
        """Draw the next token of every row from its logits."""
        tokens, logprobs = self._draw(logits, self.row_ids, self.places, self.longest + len(self.unseen))
        self.unseen.append((tokens, logprobs))
        self.places = self.places + 1
        self.last = tokens

    def must_look(self) -> bool:
        """Whether enough steps have passed, or a row cannot grow."""
        return len(self.unseen) >= self.look_every or self.longest + len(self.unseen) >= self.limit

    def _set_rows(self, rows: list[int]) -> None:
        self.rows = rows
        self.longest = max((len(self.tokens[row]) for row in rows), default=0)

    def _draw(
        self, logits: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(r,) tokens and log-probabilities for r rows, of which the longest has `longest` tokens."""
        history = self.history[:0]
        if self.sampling.repetition_penalty != 1:
            own = self.drawn[rows, :longest]
            is_own = torch.arange(longest, device=self.device) < places[:, None]
            history = torch.cat([self.history[rows], torch.where(is_own, own, self.history[rows, :1])], 1)
        uniforms = self.uniforms[rows, places]
        tokens, logprobs = sample_tokens(logits, uniforms, self.sampling.temperature, self.processors, history)
        if self.sampling.repetition_penalty != 1:
            self.drawn[rows, places] = tokens
        return tokens, logprobs

    def _take(self, rows: Sequence[int], tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Add the (r, k) tokens that r rows have drawn to their completions, each up to its end.

        Raises:
            RunError: a token was drawn from numbers that are no distribution.
        """
        for row, drawn, their_logprobs in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            own = self.tokens[row]
            for token, logprob in zip(drawn, their_logprobs, strict=True):
                if not math.isfinite(logprob):
                    raise RunError(NO_DISTRIBUTION.format(place=len(own) + 1))
                own.append(token)
                self.logprobs[row].append(logprob)
                if self.ends(own):
                    self.reasons[row] = "stop"
                elif len(own) == self.limit:
                    self.reasons[row] = "length"
                if self.reasons[row] is not None:
                    break

    def retire(self) -> tuple[list[int], np.ndarray]:
        """Look at the tokens that were drawn, and drop the rows that have finished.

        Returns:
            The finished rows, and the places of those that stay.
        """
        if self.unseen:
            tokens, logprobs = (torch.stack(part, 1) for part in zip(*self.unseen, strict=True))
            self.unseen.clear()
            self._take(self.rows, tokens, logprobs)
            self._set_rows(self.rows)
        is_alive = np.array([self.reasons[row] is None for row in self.rows], dtype=bool)
        finished = [row for row in self.rows if self.reasons[row] is not None]
        places = filled_holes(is_alive)
        if finished:
            self._set_rows([self.rows[place] for place in places])
            kept = on_device(places, self.device)
            self.row_ids, self.places, self.last = self.row_ids[kept], self.places[kept], self.last[kept]
        return finished, places
