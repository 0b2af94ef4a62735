"""An engine that says what a script has it say, and notes what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from grpo_cli.rollout.engine import Demand, OnTurn, SampledTurn, Turn

Script = Callable[[Turn], str]
"""What is said in a turn, without its end token."""


class Scripted:
    """A `TurnEngine`.

    Args:
        tokenizer: whose end-of-sequence token ends a turn.
        script: what is said.
        ends: the token after what is said; the tokenizer's own if None.
    """

    def __init__(self, tokenizer: Any, script: Script) -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.asked: list[Turn] = []
        self.demands: list[Demand] = []
        self.forgotten: set[int] = set()
        self.closed = 0

    def update_weights(self, version: int) -> int:
        return 0

    @contextmanager
    def stream(self, on_turn: OnTurn, demand: Demand) -> Iterator[ScriptedStream]:
        self.demands.append(demand)
        yield ScriptedStream(self, on_turn)

    def release_memory(self) -> None: ...

    def close(self) -> None:
        self.closed += 1


class ScriptedStream:
    """Says one turn whenever it may compute."""

    def __init__(self, engine: Scripted, on_turn: OnTurn) -> None:
        self._engine = engine
        self._on_turn = on_turn
        self._waiting: list[Turn] = []

    def ask(self, turns: Sequence[Turn]) -> None:
        self._engine.asked += turns
        self._waiting += turns

    def advance(self) -> bool:
        if not self._waiting:
            return False
        turn = self._waiting.pop(0)
        tokenizer = self._engine.tokenizer
        text = self._engine.script(turn)
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        cut = ids[: turn.max_tokens]
        reason: Any = "stop" if len(cut) == len(ids) else "length"
        self._on_turn(turn.completion, SampledTurn(cut, [-0.5] * len(cut), reason, text))
        return True

    def forget(self, completion: int) -> None:
        self._engine.forgotten.add(completion)
