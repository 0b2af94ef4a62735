"""Tools, environments and rewards in the shapes that TRL's documentation has them in; nothing here is for us."""

from __future__ import annotations

import asyncio
from typing import Any


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    return a * b


async def async_add(a: int, b: int) -> int:
    """
    Adds two integers, and lets others go on meanwhile.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The sum of the two integers.
    """
    await asyncio.sleep(0.01)
    return a + b


class CounterEnv:
    """A count that the policy is to raise."""

    def reset(self, **kwargs) -> str | None:
        self.counter = 0
        self.seen = kwargs
        return f"\nRaise it to {kwargs['goal']}."

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += step
        return self.counter

    @property
    def reward(self) -> float:
        """What it has come to; before the first reset there is nothing to evaluate."""
        return float(self.counter)


class SilentEnv:
    """Says nothing at the beginning, and scores itself."""

    def reset(self, **kwargs) -> None:
        self.pressed = []
        self._secret = kwargs.get("goal")

    async def press(self, key: str) -> str:
        """
        Press a key.

        Args:
            key: Which one.

        Returns:
            What is heard.
        """
        await asyncio.sleep(0)
        self.pressed.append(key)
        return "click"

    def get_reward(self) -> float:
        return float(len(self.pressed))


class JudgedEnv(SilentEnv):
    """Is scored by somebody who takes time."""

    async def get_reward(self) -> float:
        await asyncio.sleep(0.01)
        return 10.0 * len(self.pressed)


def counter_reward(environments, **kwargs) -> list[float | None]:
    return [environment.reward if isinstance(environment, CounterEnv) else None for environment in environments]


def calls_reward(completions, **kwargs) -> list[float]:
    """Counts the results of tools in what followed the prompt."""
    return [float(sum(message["role"] == "tool" for message in completion)) for completion in completions]


async def async_reward(completions, log_extra: Any = None, **kwargs) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(completion)) for completion in completions]
