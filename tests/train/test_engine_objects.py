"""`train(engine=...)` takes any object with an engine's methods, or a function that wraps the recipe's engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

import grpo_cli
from grpo_cli.data.prompts import Prompt
from grpo_cli.errors import UserError
from grpo_cli.rollout.embedded.engine import EmbeddedEngine
from grpo_cli.rollout.engine import Completion, Demand, OnGroup, OnTurn, SampledTurn, SampleKey, Turn
from tests.train.test_loop import numbers


class Parrot:
    """Says the same to every prompt, once more for each sample."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.closed = False

    def update_weights(self, version: int) -> int:
        self.versions.append(version)
        return 7

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        group = [
            Completion([5] * (i + 1), [-1.0] * (i + 1), "stop", "&" * (i + 1)) for i in range(num_generations)
        ]
        return [group for _ in prompts]

    def release_memory(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_an_object_generates_in_place_of_the_recipe_s_engine(tiny_recipe: dict[str, Any]) -> None:
    parrot = Parrot()
    result = grpo_cli.train(tiny_recipe, engine=parrot)
    assert [row["completions/max_length"] for row in result.metrics] == [4, 4, 4]
    assert [row["sync/bytes"] for row in result.metrics] == [7, 7, 7]
    assert parrot.versions[-3:] == [0, 1, 2]
    assert parrot.closed


class Echo:
    """Says a prompt's last token again, on a thread that has nothing else to do."""

    def __init__(self) -> None:
        self.asked: list[Turn] = []

    def update_weights(self, version: int) -> int:
        return 0

    @contextmanager
    def stream(self, on_turn: OnTurn, demand: Demand) -> Iterator[Any]:
        class Stream:
            def ask(_, turns: Sequence[Turn]) -> None:
                self.asked += turns
                for turn in turns:
                    said = [turn.token_ids[-1]] * (turn.sample + 1)
                    on_turn(turn.completion, SampledTurn(said, [-1.0] * len(said), "stop", "&" * len(said)))

            def advance(_) -> bool:
                return False

            def forget(_, completion: int) -> None: ...

        yield Stream()

    def release_memory(self) -> None: ...

    def close(self) -> None: ...


def test_an_object_that_gives_turns_is_an_engine_too(tiny_recipe: dict[str, Any]) -> None:
    echo = Echo()
    result = grpo_cli.train(tiny_recipe, engine=echo)
    assert [row["completions/max_length"] for row in result.metrics] == [4, 4, 4]
    assert [turn.sample for turn in echo.asked[:4]] == [0, 1, 2, 3]
    assert {turn.may_go_on for turn in echo.asked} == {False}


def test_a_function_is_given_the_recipe_s_engine(tiny_recipe: dict[str, Any]) -> None:
    given: list[Any] = []
    straight = grpo_cli.train(tiny_recipe)
    tiny_recipe["train"]["output_dir"] += "-wrapped"
    wrapped = grpo_cli.train(tiny_recipe, engine=lambda engine: given.append(engine) or engine)
    assert isinstance(given[0].engine, EmbeddedEngine)
    files = [result.output_dir / "metrics.jsonl" for result in (straight, wrapped)]
    assert numbers(files[0]) == numbers(files[1])


def test_what_is_no_engine_and_what_stands_beside_one_are_refused(tiny_recipe: dict[str, Any]) -> None:
    not_an_engine: Any = object()
    with pytest.raises(UserError, match="engine: object lacks one of the methods"):
        grpo_cli.train(tiny_recipe, engine=not_an_engine)
    tiny_recipe["generation"]["engine"] = "vllm"
    with pytest.raises(UserError, match=r"generation\.engine: an engine object was given"):
        grpo_cli.train(tiny_recipe, engine=Parrot())
