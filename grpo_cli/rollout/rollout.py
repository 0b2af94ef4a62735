"""A step's completions, and the shapes that rewards and training want them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grpo_cli.algorithm.packing import Group
from grpo_cli.data.prompts import Prompt
from grpo_cli.reward.scorer import ScoringBatch
from grpo_cli.rollout.engine import Completion, RolloutEngine, SampledRow, SampleKey


@dataclass(frozen=True)
class Rollout:
    prompts: list[Prompt]
    """P prompts."""
    completions: list[Completion]
    """N = P·G completions; those of a prompt are neighbours."""
    num_generations: int
    """G."""

    @classmethod
    def joined(cls, parts: Iterable[Rollout]) -> Rollout:
        """One rollout of the groups of several, in their order; at least one."""
        parts = list(parts)
        return cls(
            [prompt for part in parts for prompt in part.prompts],
            [completion for part in parts for completion in part.completions],
            parts[0].num_generations,
        )

    def group(self, index: int) -> Rollout:
        """The rollout of one prompt alone."""
        size = self.num_generations
        return Rollout([self.prompts[index]], self.completions[size * index : size * (index + 1)], size)

    @cached_property
    def rows(self) -> list[SampledRow]:
        """R rows, at least one of each completion, in their order."""
        return [row for rows in self.rows_by_completion for row in rows]

    @cached_property
    def row_owners(self) -> list[int]:
        """R places of the completion that a row is of."""
        return [place for place, rows in enumerate(self.rows_by_completion) for _ in rows]

    @cached_property
    def rows_by_completion(self) -> list[list[SampledRow]]:
        """The rows of each of the N completions."""
        size = self.num_generations
        return [completion.rows(self.prompts[i // size]) for i, completion in enumerate(self.completions)]

    def is_lost(self, index: int) -> bool:
        """Whether there is nothing of the group of this prompt."""
        size = self.num_generations
        return any(one.finish_reason == "lost" for one in self.completions[size * index : size * (index + 1)])

    def groups(self) -> list[Group]:
        """The P groups, as packing takes them; their samples are places among the R rows."""
        size = self.num_generations
        groups, first = [], 0
        for index, prompt in enumerate(self.prompts):
            of_prompt = self.rows_by_completion[size * index : size * (index + 1)]
            rows = [row for of_completion in of_prompt for row in of_completion]
            sampled = [row.sampled or [True] * len(row.token_ids) for row in rows]
            begin_alike = all(row.prompt_ids == rows[0].prompt_ids for row in rows)
            groups.append(
                Group(
                    rows[0].prompt_ids if rows else prompt.token_ids,
                    [row.token_ids for row in rows],
                    range(first, first + len(rows)),
                    sampled if any(row.sampled is not None for row in rows) else None,
                    None if begin_alike else [row.prompt_ids for row in rows],
                )
            )
            first += len(rows)
        return groups

    def scoring_batch(self) -> ScoringBatch:
        """What reward functions see: every list has N entries."""
        given = [prompt for prompt in self.prompts for _ in range(self.num_generations)]
        repeated = [one.prompt or prompt for one, prompt in zip(self.completions, given, strict=True)]
        columns = list(self.prompts[0].columns) if self.prompts else []
        plays = any(completion.messages is not None for completion in self.completions)
        return ScoringBatch(
            prompts=[prompt.content for prompt in repeated],
            completions=[
                as_reply(completion.text, prompt) if completion.messages is None else completion.messages
                for prompt, completion in zip(repeated, self.completions, strict=True)
            ],
            completion_ids=[list(completion.token_ids) for completion in self.completions],
            columns={name: [prompt.columns[name] for prompt in repeated] for name in columns},
            environments=[completion.environment for completion in self.completions] if plays else None,
        )

    def num_tokens(self) -> int:
        """Prompt tokens and sampled ones, the prompt counted once for each completion, as TRL counts them."""
        prompts = sum(len(prompt.token_ids) for prompt in self.prompts) * self.num_generations
        return prompts + sum(completion.num_sampled for completion in self.completions)


def generate_rollout(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    key: SampleKey,
    num_generations: int,
    *,
    first: int = 0,
    on_group: Callable[[int, Rollout], None] | None = None,
) -> Rollout:
    """Generate `num_generations` completions for each prompt.

    Prompt i draws from the random stream (*key, first + i), so that a set of prompts may come in several parts.
    `on_group` is called with i and the rollout of that prompt as soon as its group is finished.
    """

    def finished(index: int, completions: list[Completion]) -> None:
        assert on_group is not None
        on_group(index, Rollout([prompts[index]], list(completions), num_generations))

    groups = engine.generate(
        prompts,
        [(*key, first + index) for index in range(len(prompts))],
        num_generations,
        on_group=None if on_group is None else finished,
    )
    return Rollout(list(prompts), [completion for group in groups for completion in group], num_generations)


def as_reply(text: str, prompt: Prompt) -> str | list[dict[str, Any]]:
    """A completion in the shape of its prompt: text, or one assistant message."""
    return text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]
