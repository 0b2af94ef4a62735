"""A game without tools: what the policy writes is its move, and the environment answers it."""

from __future__ import annotations

import random
import re
from typing import Any

_NUMBER = re.compile(r"(?<![\d.])\d+(?![\d.]*\d)")

HOW_TO_ANSWER = "Reply with a number only, such as 7."
"""Of the ways that were tried the one that a model of 135 million parameters follows most: every third time."""


class GuessingGame:
    """Guess a number; the answer to each guess is whether the number is higher or lower.

    A guess is the only whole number of a turn. The reward is the mean over all turns that the game may have: 1 for
    the number itself and for every turn after it, less for a guess the further it is away, 0 for a turn without a
    guess and for one that was not played. So it rises with each thing that is learned: to write a number, to begin
    in the middle, to go the right way.
    """

    def __init__(self, low: int = 1, high: int = 20, guesses: int = 4) -> None:
        """Make a game.

        Args:
            low: the lowest number that may be thought of.
            high: the highest.
            guesses: turns.

        Raises:
            ValueError: `high` is not above `low`, or there is no turn.
        """
        if high <= low or guesses < 1:
            raise ValueError(f"needs high above low and guesses of 1 or more, not {low}, {high} and {guesses}")
        self.low, self.high, self.guesses = low, high, guesses
        self.secret = low
        self.closeness: list[float] = []

    def reset(self, seed: int = 0, **columns: Any) -> str:
        """Think of a number, the same for the same seed.

        Args:
            seed: of the random numbers.
            columns: of the row; not used.

        Returns:
            The rules.
        """
        self.secret = random.Random(seed).randint(self.low, self.high)
        self.closeness = []
        return f"Guess my number from {self.low} to {self.high}. {HOW_TO_ANSWER}"

    def respond(self, text: str) -> str | None:
        """Answer a turn.

        Args:
            text: what the policy wrote.

        Returns:
            Whether the number is higher or lower, and how to write a guess; None at the end of the game.
        """
        numbers = _NUMBER.findall(text)
        guess = int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) < 10 else None
        if guess is None or not self.low <= guess <= self.high:
            self.closeness.append(0.0)
            answer = HOW_TO_ANSWER
        else:
            self.closeness.append(1 - abs(guess - self.secret) / (self.high - self.low + 1))
            answer = f"{'Higher' if guess < self.secret else 'Lower'}. {HOW_TO_ANSWER}"
        return None if guess == self.secret or len(self.closeness) >= self.guesses else answer

    def get_reward(self) -> float:
        """From 0 to 1; see the class."""
        found = bool(self.closeness) and self.closeness[-1] == 1.0
        return (sum(self.closeness) + found * (self.guesses - len(self.closeness))) / self.guesses
