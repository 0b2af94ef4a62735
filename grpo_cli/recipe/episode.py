"""The section `episode`: what the policy acts with between its turns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from grpo_cli.recipe.section import LONGEST_WAIT_S, Section

ONE, SEVERAL = "(one environment)", "(environments by name)"
"""Pydantic's names for the two forms of `environment`, which stand in its errors between the keys."""


class EnvironmentConfig(Section):
    path: str = Field(min_length=1)
    """`module:Class`, or `module:factory` that returns an environment."""
    params: dict[str, Any] = {}
    """Keyword arguments of the class or factory."""


def environment_from_string(value: Any) -> Any:
    """`games:Chess` is short for `{path: games:Chess}`."""
    return {"path": value} if isinstance(value, str) else value


def _form(value: Any) -> str:
    """Which form of `environment` was meant: a mapping without `path` gives names to several."""
    return SEVERAL if isinstance(value, dict) and "path" not in value else ONE


OneEnvironment = Annotated[EnvironmentConfig, BeforeValidator(environment_from_string)]


class EpisodeConfig(Section):
    tools: list[str] = []
    """`module:function` of each tool: a typed function, `async` or not, with a Google docstring."""
    environment: (
        Annotated[
            Annotated[OneEnvironment, Tag(ONE)] | Annotated[dict[str, OneEnvironment], Tag(SEVERAL)],
            Discriminator(_form),
        ]
        | None
    ) = None
    """The environment of each episode: `module:Class`, a section with the keys below, or a mapping of names to
    these, of which each row's column `environment` names one."""
    max_turns: int = Field(default=10, ge=1)
    """Turns of the policy in an episode."""
    max_result_tokens: int = Field(default=1024, ge=1)
    """Longest answer of a tool or an environment; what is longer is cut, with a note."""
    timeout_s: float = Field(default=60, gt=0, le=LONGEST_WAIT_S)
    """Longest time for one call of a tool or an environment, in seconds."""
    workers: int = Field(default=16, ge=1)
    """Calls that run at the same time."""
    on_error: Literal["tell", "end", "raise"] = "tell"
    """When a tool fails: `tell` the policy what happened, `end` the episode, or `raise`, which ends the run."""

    @property
    def environments(self) -> dict[str | None, EnvironmentConfig]:
        """The environments by name; a single one has the name None."""
        if self.environment is None:
            return {}
        if isinstance(self.environment, EnvironmentConfig):
            return {None: self.environment}
        found: dict[str | None, EnvironmentConfig] = {}
        found.update(self.environment.items())
        return found
