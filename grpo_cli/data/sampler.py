"""Which prompts belong to which step: a pure function of the seed and the step.

Nothing here is state that a checkpoint would have to hold, so a resumed run sees the prompts that the
uninterrupted one would have seen. No torch import.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

FURTHER_STREAM = 1
"""Third part of the seed of a step's further prompts; an epoch's order has two parts."""


class PromptSampler:
    """Cuts an endless stream of epochs, each a permutation of the prompts, into steps.

    Step `s` is positions `s * prompts_per_step` and following of the stream, so neither number has to divide
    the other, and a step may hold more prompts than there are.
    """

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int, shuffle: bool) -> None:
        if num_prompts < 1 or prompts_per_step < 1:
            raise ValueError(f"needs a prompt and a place for it, not {num_prompts=} and {prompts_per_step=}")
        self.num_prompts = num_prompts
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def at(self, step: int) -> list[int]:
        """Indices of the prompts of a step, counted from 0."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        prompts: list[int] = []
        position, end = step * self.prompts_per_step, (step + 1) * self.prompts_per_step
        while position < end:
            epoch, start = divmod(position, self.num_prompts)
            stop = min(self.num_prompts, start + end - position)
            prompts += self._order(epoch)[start:stop].tolist()
            position += stop - start
        return prompts

    def further(self, step: int, start: int, count: int) -> list[int]:
        """Indices of `count` more prompts for a step whose own did not fill it, from place `start` of their list.

        The list holds all prompts that are not the step's own, then its own, and then begins again. Its order is
        drawn for this step; without `shuffle` it is the order of the data.
        """
        if self.shuffle:
            seeds = np.random.SeedSequence([self.seed, step, FURTHER_STREAM])
            order = np.random.Generator(np.random.Philox(seeds)).permutation(self.num_prompts)
        else:
            order = np.roll(np.arange(self.num_prompts), -(step + 1) * self.prompts_per_step)
        is_own = np.isin(order, self.at(step))
        order = np.concatenate([order[~is_own], order[is_own]])
        indices: list[int] = order[np.arange(start, start + count) % self.num_prompts].tolist()
        return indices

    def epoch(self, step: int) -> float:
        """Passes over the prompts that `step` steps have made."""
        return step * self.prompts_per_step / self.num_prompts

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        seeds = np.random.SeedSequence([self.seed, epoch])
        return np.random.Generator(np.random.Philox(seeds)).permutation(self.num_prompts)
