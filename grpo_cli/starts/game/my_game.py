"""The environment of this experiment: a game that the policy plays by writing its moves."""

import random
import re
from typing import Any

RULES = "Take 1, 2 or 3. Reply with the number only."


class Nim:
    """Take one to three stones in turn with an opponent who moves at random; who takes the last one wins.

    Each episode has an object to itself. Games with the same seed begin alike, and go on alike after the same
    moves, so that the completions of a prompt can be compared.
    """

    def __init__(self, fewest: int, most: int) -> None:
        """Games begin with `fewest` to `most` stones."""
        self.fewest, self.most = fewest, most

    def reset(self, seed: int, **_: Any) -> str:
        """Begin a game; what is returned is what the policy reads first."""
        self.random = random.Random(seed)
        self.stones = self.random.randint(self.fewest, self.most)
        self.moves = self.right_moves = 0
        self.won = False
        return f"There are {self.stones} stones. Who takes the last one wins. {RULES}"

    def respond(self, text: str) -> str | None:
        """Answer a move of the policy; None ends the game."""
        self.moves += 1
        move = re.fullmatch(r"\s*([1-3])\.?\s*", text)
        if move is None or int(move[1]) > self.stones:
            return f"That is no move. There are {self.stones} stones. {RULES}"
        self.right_moves += 1
        self.stones -= int(move[1])
        if not self.stones:
            self.won = True
            return None
        taken = self.random.randint(1, min(3, self.stones))
        self.stones -= taken
        return f"I take {taken}. There are {self.stones} stones. {RULES}" if self.stones else None

    def get_reward(self) -> float:
        """From 0 to 1, asked for at the end: 0.9 for winning, 0.1 times the share of turns that were moves."""
        return 0.1 * self.right_moves / max(1, self.moves) + 0.9 * self.won
