"""Environments like TRL's are taken as they are, and what one lacks is said before the run begins."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.episode.environments import (
    EnvironmentKind,
    check_reset,
    check_scored,
    environment_kind,
    environment_rewards,
    resolve_environments,
    resolve_tools,
)
from grpo_cli.errors import UserError
from grpo_cli.recipe.episode import EpisodeConfig
from grpo_cli.reward.registry import check_columns
from grpo_cli.reward.scorer import Scorer, ScoringBatch

GAMES = '''
class Counter:
    """TRL's shape: a tool, a reward, text from reset."""

    closed = []

    def __init__(self, start: int = 0):
        self.start = start

    @property
    def costly(self):
        raise RuntimeError("a property was evaluated")

    def reset(self, **kwargs) -> str:
        self.count = self.start
        return f"Count from {self.start}."

    def increment(self, step: int) -> int:
        """
        Increment the counter.

        Args:
            step: How much to add.

        Returns:
            The new count.
        """
        self.count += step
        return self.count

    async def wait(self, seconds: float) -> str:
        """
        Wait.

        Args:
            seconds: How long.

        Returns:
            What happened.
        """
        return "waited"

    def _private(self):
        pass

    def get_reward(self) -> float:
        return float(self.count)


class Talker:
    def reset(self, secret, seed=None):
        pass

    def respond(self, text):
        return None

    def close(self):
        Counter.closed.append("talker")


class Judged(Counter):
    async def get_reward(self):
        return 7.0


def make_talker():
    return Talker()


class NoReset:
    pass


class NeedsTwo:
    def __init__(self, one, two):
        pass

    def reset(self):
        pass


class Breaks:
    def __init__(self):
        raise RuntimeError("no such server")

    def reset(self):
        pass


class Undescribed:
    def reset(self):
        pass

    def move(self, place):
        """Move."""


def increment(step: int) -> int:
    """Add.

    Args:
        step: How much.
    """
    return step
'''


@pytest.fixture
def games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of environments in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "games_of_test.py").write_text(GAMES)
    yield None
    sys.modules.pop("games_of_test", None)


def kinds_of(environment: Any, tools: list[str] | None = None) -> dict[str | None, EnvironmentKind]:
    config = EpisodeConfig.model_validate({"environment": environment, "tools": tools or []})
    return resolve_environments(config, resolve_tools(config.tools))


def kind_of(environment: Any) -> EnvironmentKind:
    return kinds_of(environment)[None]


def test_every_public_method_but_the_four_is_a_tool(games: None) -> None:
    kind = kind_of("games_of_test:Counter")
    assert [(tool.name, tool.is_async) for tool in kind.tools] == [("increment", False), ("wait", True)]
    assert list(kind.tools[0].properties) == ["step"]
    assert (kind.name, kind.class_name, kind.has_reward, kind.responds) == (None, "Counter", True, False)
    kind = kind_of("games_of_test:make_talker")
    assert (kind.tools, kind.class_name, kind.has_reward, kind.responds) == ([], "Talker", False, True)
    assert sys.modules["games_of_test"].Counter.closed == ["talker"], "what was made to look at it"


def test_params_reach_the_class_and_each_object_has_its_own(games: None) -> None:
    high = {"path": "games_of_test:Counter", "params": {"start": 9}}
    kinds = kinds_of({"low": "games_of_test:Counter", "high": high})
    assert [(name, kind.make().reset()) for name, kind in kinds.items()] == [
        ("low", "Count from 0."),
        ("high", "Count from 9."),
    ]
    kind = kind_of({"path": "games_of_test:Counter", "params": {"start": [1]}})
    kind.make().start.append(2)
    assert kind.make().start == [1]


def test_reset_is_given_the_row_and_the_seed_only_if_it_asks_for_it(games: None) -> None:
    row = {"secret": "apple", "level": 2}
    counter, talker = kind_of("games_of_test:Counter"), kind_of("games_of_test:Talker")
    assert (counter.takes_seed, talker.takes_seed) == (False, True)
    assert counter.reset_arguments([], row, 5) == {"prompt": [], **row}, "as TRL: a **kwargs gets the row alone"
    assert talker.reset_arguments([], row, 5) == {"secret": "apple", "seed": 5}
    assert talker.reset_arguments([], row | {"seed": 1}, 5)["seed"] == 1, "the row's own"
    assert counter.reset_arguments([], row | {"environment": "x"}, 5)["environment"] == "x"


def test_of_several_environments_none_is_told_its_own_name(games: None) -> None:
    kind = kinds_of({"a": "games_of_test:Counter"})["a"]
    assert kind.reset_arguments([], {"environment": "a", "level": 1}, 5) == {"prompt": [], "level": 1}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("games_of_test:Count", "episode.environment: games_of_test has no Count; did you mean Counter?"),
        ({"a": "nothing:x"}, "episode.environment.a: there is no module 'nothing'"),
        ("games_of_test:GAMES_", "games_of_test has no GAMES_"),
        ("games_of_test:__name__", "__name__ is of type str, neither a class nor a function"),
        ("games_of_test:NoReset", "an object of class NoReset, which has no method reset"),
        ("games_of_test:NeedsTwo", "NeedsTwo(one, two) cannot be called with params: missing a required argument"),
        (
            {"path": "games_of_test:Counter", "params": {"begin": 1}},
            "Counter(start: int = 0) cannot be called with params: got an unexpected keyword argument 'begin'",
        ),
        ("games_of_test:Breaks", "Breaks cannot be made: "),
        ("games_of_test:Breaks", "games_of_test.py:84: RuntimeError: no such server"),
        (
            "games_of_test:Undescribed",
            "episode.environment: games_of_test:Undescribed: move: parameter 'place'",
        ),
    ],
)
def test_an_environment_that_cannot_be_one_says_why(games: None, environment: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        kinds_of(environment)


def test_tools_and_methods_share_one_set_of_names(games: None) -> None:
    with pytest.raises(UserError, match="games_of_test:Counter: two tools are called increment"):
        kinds_of("games_of_test:Counter", ["games_of_test:increment"])
    with pytest.raises(UserError, match=r"episode\.tools\.1: games_of_test has no decrement"):
        resolve_tools(["games_of_test:increment", "games_of_test:decrement"])


def test_columns_that_reset_or_the_choice_need_are_missed_early(games: None) -> None:
    talker = kinds_of("games_of_test:Talker")
    check_reset(talker, ["secret"], "data")
    with pytest.raises(UserError, match=r"reset of Talker needs the column secret, which data.eval does not have"):
        check_reset(talker, ["word"], "data.eval")
    several = kinds_of({"a": "games_of_test:Counter", "b": "games_of_test:Judged"})
    check_reset(several, ["environment"], "data")
    with pytest.raises(UserError, match=r"data has no column environment, which says .* \(a, b\); it has: none"):
        check_reset(several, [], "data")


def test_get_reward_is_a_column_named_after_the_class_and_of_that_class_alone(games: None) -> None:
    kinds = kinds_of(
        {"a": "games_of_test:Counter", "same": "games_of_test:Counter", "b": "games_of_test:Judged",
         "c": "games_of_test:Talker"}
    )  # fmt: skip
    functions = environment_rewards(kinds)
    assert [(function.name, function.weight) for function in functions] == [("Counter", 1.0), ("Judged", 1.0)]
    check_columns(functions, ["environment"], "data", has_environments=True)
    objects = [kinds[name].make() for name in ("a", "b", "c", "same")]
    for number, instance in enumerate(objects):
        instance.reset(*(["x"] if number == 2 else []))
    objects[0].increment(3)
    batch = ScoringBatch(["p"] * 4, ["c"] * 4, [[1]] * 4, {}, environments=objects)
    scores = Scorer(functions).score(batch, step=1)
    assert [[None if value != value else value for value in row] for row in scores.tolist()] == [
        [3.0, None],
        [None, 7.0],
        [None, None],
        [0.0, None],
    ]


def test_a_run_without_rewards_needs_get_reward(games: None) -> None:
    counter, talker = kinds_of("games_of_test:Counter"), kinds_of("games_of_test:Talker")
    check_scored(counter, environment_rewards(counter))
    with pytest.raises(UserError, match="rewards: there are none, and Talker has no method get_reward"):
        check_scored(talker, environment_rewards(talker))


def test_a_class_of_python_is_taken_as_well(games: None) -> None:
    class Game:
        async def close(self) -> None:
            await asyncio.sleep(0)
            closed.append(self)

        def reset(self) -> None:
            pass

    closed: list[Any] = []
    kind = environment_kind(Game, None)
    assert kind.class_name == "Game"
    assert len(closed) == 1, "what was made to look at it is closed again"


def test_looking_at_environments_imports_no_torch() -> None:
    code = "import sys, grpo_cli.episode.pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
