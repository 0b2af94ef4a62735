"""A step's completions, and the shapes that rewards and training want them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_cli.algorithm.packing import Group
from grpo_cli.data.prompts import Prompt
from grpo_cli.reward.scorer import ScoringBatch
from grpo_cli.rollout.engine import Completion, RolloutEngine, SampleKey


@dataclass(frozen=True)
class Rollout:
    prompts: list[Prompt]
    """P prompts."""
    completions: list[Completion]
    """N = P·G completions; those of a prompt are neighbours."""
    num_generations: int
    """G."""

    @classmethod
    def joined(cls, parts: Sequence[Rollout]) -> Rollout:
        """One rollout of the groups of several, in their order; at least one."""
        return cls(
            [prompt for part in parts for prompt in part.prompts],
            [completion for part in parts for completion in part.completions],
            parts[0].num_generations,
        )

    def group(self, index: int) -> Rollout:
        """The rollout of one prompt alone."""
        size = self.num_generations
        return Rollout([self.prompts[index]], self.completions[size * index : size * (index + 1)], size)

    def groups(self) -> list[Group]:
        """The P groups, as packing takes them."""
        size = self.num_generations
        return [
            Group(
                prompt.token_ids,
                [completion.token_ids for completion in self.completions[size * index : size * (index + 1)]],
                range(size * index, size * (index + 1)),
            )
            for index, prompt in enumerate(self.prompts)
        ]

    def scoring_batch(self) -> ScoringBatch:
        """What reward functions see: every list has N entries."""
        repeated = [prompt for prompt in self.prompts for _ in range(self.num_generations)]
        columns = list(self.prompts[0].columns) if self.prompts else []
        return ScoringBatch(
            prompts=[prompt.content for prompt in repeated],
            completions=[
                as_reply(completion.text, prompt)
                for prompt, completion in zip(repeated, self.completions, strict=True)
            ],
            completion_ids=[list(completion.token_ids) for completion in self.completions],
            columns={name: [prompt.columns[name] for prompt in repeated] for name in columns},
        )

    def num_tokens(self) -> int:
        """Prompt and completion tokens, the prompt counted once for each completion, as TRL counts them."""
        prompts = sum(len(prompt.token_ids) for prompt in self.prompts) * self.num_generations
        return prompts + sum(len(completion.token_ids) for completion in self.completions)


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
