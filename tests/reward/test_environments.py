"""Reward functions look into the environments of the episodes that they score, where they name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import RewardConfig
from grpo_cli.reward.registry import check_columns, resolve_rewards, reward_from_callable
from grpo_cli.reward.scorer import Scorer, ScoringBatch


class Game:
    def __init__(self, points: float) -> None:
        self.points = points


def batch(environments: list[Any] | None, count: int = 2) -> ScoringBatch:
    return ScoringBatch(["p"] * count, ["c"] * count, [[1]] * count, {}, environments)


def points(environments: Sequence[Game]) -> list[float]:
    return [game.points for game in environments]


def points_or_nothing(
    completions: Sequence[str], environments: Sequence[Game] | None = None, **columns: Any
) -> list[float | None]:
    return [None] * len(completions) if environments is None else [game.points for game in environments]


async def points_later(environments: Sequence[Game], **columns: Any) -> list[float]:
    return [game.points for game in environments]


def takes_anything(**arguments: Any) -> list[float]:
    return [float("environments" in arguments)] * len(arguments["completions"])


def test_who_names_the_environments_gets_the_objects_themselves_in_the_order_of_completions() -> None:
    functions = [reward_from_callable(function) for function in (points, points_or_nothing, points_later)]
    games = [Game(1.0), Game(2.0)]
    scores = Scorer(functions).score(batch(games), step=1)
    assert scores.tolist() == [[1.0] * 3, [2.0] * 3]

    def vandal(environments: list[Game]) -> list[float]:
        environments[0].points = 9.0
        environments.reverse()
        return [0.0, 0.0]

    Scorer([reward_from_callable(vandal)]).score(batch(games), step=1)
    assert [game.points for game in games] == [9.0, 2.0]


def test_who_only_takes_anything_does_not_get_them_on_one_process_or_several() -> None:
    function = reward_from_callable(takes_anything)
    assert Scorer([function]).score(batch([Game(1.0), Game(2.0)]), step=1)[:, 0].tolist() == [0.0, 0.0]
    assert not function.shares_work


def test_groups_are_scored_on_the_process_that_has_their_environments() -> None:
    assert reward_from_callable(points).shares_work
    assert reward_from_callable(points_or_nothing).shares_work
    assert not reward_from_callable(lambda completions: [0.0]).shares_work


def test_without_environments_an_argument_with_a_default_has_it() -> None:
    function = reward_from_callable(points_or_nothing)
    check_columns([function], [], "data")
    scores = Scorer([function]).score(batch(None), step=1)
    assert str(scores[:, 0].tolist()) == "[nan, nan]"


def test_what_cannot_be_given_is_refused_before_the_run() -> None:
    function = reward_from_callable(points)
    check_columns([function], [], "data", has_environments=True)
    check_columns([function], ["environments"], "data")  # a column like any other
    with pytest.raises(UserError, match=r"reward points asks for environments, and there are none; add episode\."):
        check_columns([function], [], "data")
    with pytest.raises(UserError, match=r"data\.columns: .* rename it with data\.columns: \{environments: env"):
        check_columns([function], ["environments"], "data", has_environments=True)


def test_a_function_in_a_process_of_its_own_cannot_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apart.py").write_text("def points(completions, environments=None): return [0.0]\n")
    monkeypatch.chdir(tmp_path)
    functions = resolve_rewards([RewardConfig(path="apart:points", isolate=True)])
    check_columns(functions, [], "data")
    with pytest.raises(
        UserError, match=r"reward points asks for environments, .*; remove isolate, or the argument"
    ):
        check_columns(functions, [], "data", has_environments=True)


def test_there_is_an_environment_for_each_completion() -> None:
    with pytest.raises(ValueError, match="environments has 1 entries for 2 completions"):
        batch([Game(1.0)])
