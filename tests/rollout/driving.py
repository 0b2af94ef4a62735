"""An engine of turns, driven with prompts that are token ids alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_cli.data.prompts import Prompt
from grpo_cli.episode.driver import Driver
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey, Turn


def as_prompts(prompts: Sequence[Sequence[int]]) -> list[Prompt]:
    return [Prompt(row, "", list(token_ids), {}) for row, token_ids in enumerate(prompts)]


def first_turns(
    token_ids: Sequence[int], key: SampleKey, count: int, max_tokens: int, *, group: int = 0
) -> list[Turn]:
    """The turns of a group of completions of one turn each."""
    return [
        Turn(group * count + sample, group, token_ids, key, sample, 0, max_tokens, may_go_on=False)
        for sample in range(count)
    ]


class Driven:
    """Gives whole completions; what else is asked for or set is the engine's."""

    def __init__(self, engine: Any) -> None:
        object.__setattr__(self, "engine", engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.engine, name, value)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        settings = self.engine.sampling if hasattr(self.engine, "sampling") else self.engine.config
        driver = Driver(self.engine, settings.max_completion_tokens)
        return driver.generate(as_prompts(prompts), keys, num_generations, on_group=on_group)
