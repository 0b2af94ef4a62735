"""The tools and environments that a recipe names, or that came as Python objects. No torch import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_cli.episode.environments import (
    EnvironmentKind,
    check_reset,
    check_scored,
    environment_kind,
    environment_rewards,
    resolve_environments,
    resolve_tools,
    tools_of_callables,
)
from grpo_cli.episode.template import EpisodeTemplate
from grpo_cli.episode.tools import Tool
from grpo_cli.episode.world import World
from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import Recipe
from grpo_cli.reward.registry import RewardFunction


@dataclass(frozen=True)
class Cast:
    """Who acts beside the policy; nobody in a recipe without episodes."""

    tools: list[Tool]
    kinds: dict[str | None, EnvironmentKind]

    @classmethod
    def of(
        cls, recipe: Recipe, tools: Sequence[Callable[..., Any]] | None = None, environment: Any = None
    ) -> Cast:
        """What the recipe's `episode` names.

        Args:
            recipe: of the run.
            tools: functions in place of `episode.tools`.
            environment: a class, or classes by name, in place of `episode.environment`.

        Raises:
            UserError: one cannot be found or used.
        """
        episode = recipe.episode
        if episode is None:
            return cls([], {})
        listed = resolve_tools(episode.tools) if tools is None else tools_of_callables(tools)
        if environment is None:
            return cls(listed, resolve_environments(episode, listed))
        named = environment if isinstance(environment, Mapping) else {None: environment}
        return cls(listed, {name: environment_kind(one, name, listed) for name, one in named.items()})

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What a chat template is given of the tools that all prompts have."""
        return {"tools": [tool.schema for tool in self.tools]} if self.tools else {}

    def with_rewards(self, functions: Sequence[RewardFunction]) -> list[RewardFunction]:
        """The reward functions, and those of environments that score themselves.

        Raises:
            UserError: there is none at all.
        """
        own = [*functions, *environment_rewards(self.kinds)]
        check_scored(self.kinds, own)
        return own

    def check_rows(self, columns: Sequence[str], setting: str) -> None:
        """Raise UserError if a data set lacks a column that environments need."""
        check_reset(self.kinds, columns, setting)

    def check_template(self, template: EpisodeTemplate) -> None:
        """Raise UserError if a chat template cannot show the policy what it is answered."""
        why = None
        if self.tools or any(kind.tools for kind in self.kinds.values()):
            why = template.why_no_tools()
        if why is None and any(kind.responds for kind in self.kinds.values()):
            why = template.why_no_replies()
        if why is not None:
            raise UserError(f"episode: {why}")

    def world(self, recipe: Recipe, tokenizer: Any, end_ids: set[int]) -> World | None:
        """What episodes are played in, if there are any.

        Args:
            recipe: of the run.
            tokenizer: of the policy.
            end_ids: tokens that end a turn.

        Raises:
            UserError: the chat template cannot show the policy what it is answered.
        """
        if recipe.episode is None:
            return None
        kwargs = recipe.model.chat_template_kwargs
        self.check_template(EpisodeTemplate(tokenizer, kwargs))
        limit = recipe.data.max_prompt_tokens
        return World(recipe.episode, self.tools, self.kinds, tokenizer, kwargs, end_ids, limit)
