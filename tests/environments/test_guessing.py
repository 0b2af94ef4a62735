"""The game's reward rises with every thing that a player can learn."""

from __future__ import annotations

import pytest

from environments.guessing import HOW_TO_ANSWER, GuessingGame
from grpo_cli.episode.environments import environment_kind

HIGHER = f"Higher. {HOW_TO_ANSWER}"


def play(*turns: str, seed: int = 5) -> tuple[list[str | None], float]:
    """The answers and the reward. The secret of seed 5 is 20."""
    game = GuessingGame()
    game.reset(seed=seed)
    answers = []
    for turn in turns:
        answers.append(game.respond(turn))
        if answers[-1] is None:
            break
    return answers, game.get_reward()


def test_the_secret_is_the_seeds() -> None:
    game = GuessingGame()

    def secret(seed: int) -> int:
        assert "from 1 to 20" in game.reset(seed=seed)
        return game.secret

    secrets = [secret(seed) for seed in range(200)]
    assert secrets == [secret(seed) for seed in range(200)]
    assert set(secrets) == set(range(1, 21))
    assert secret(5) == 20


def test_a_guess_is_answered_until_it_is_right_or_the_last() -> None:
    assert play("10", "15", "20")[0] == [HIGHER, HIGHER, None]
    assert play("1", "2", "3", "4")[0] == [HIGHER, HIGHER, HIGHER, None]
    game = GuessingGame()
    game.reset(seed=1)
    assert game.respond(str(game.secret + 1)) == f"Lower. {HOW_TO_ANSWER}"


@pytest.mark.parametrize("turn", ["", "higher", "10 or 11", "21", "0", "3.5", "9" * 400, "1" * 12])
def test_a_turn_without_one_number_of_the_range_is_no_guess(turn: str) -> None:
    assert play(turn) == ([HOW_TO_ANSWER], 0.0)


@pytest.mark.parametrize("turn", ["12", " 12.", "I guess 12!", "12\n", "It is **12**"])
def test_words_around_a_number_do_not_matter(turn: str) -> None:
    assert play(turn)[1] == pytest.approx((1 - 8 / 20) / 4)


def test_better_play_has_a_higher_reward() -> None:
    games = [
        (),
        ("hello", "hello", "hello", "hello"),
        ("1",),
        ("10",),
        ("10", "9", "8", "7"),
        ("10", "15", "12", "13"),
        ("10", "15", "18", "19"),
        ("10", "15", "20"),
        ("10", "20"),
        ("20",),
    ]
    rewards = [play(*turns)[1] for turns in games]
    assert rewards[:2] == [0.0, 0.0]
    assert rewards[1:] == sorted(rewards[1:])
    assert len(set(rewards)) == len(rewards) - 1
    assert rewards[-1] == 1.0


def test_a_game_that_cannot_be_played_is_refused() -> None:
    with pytest.raises(ValueError, match="needs high above low"):
        GuessingGame(low=3, high=3)
    with pytest.raises(ValueError, match="guesses of 1 or more"):
        GuessingGame(guesses=0)


def test_it_is_an_environment_without_tools() -> None:
    kind = environment_kind(GuessingGame, None)
    assert (kind.tools, kind.takes_seed, kind.responds, kind.has_reward) == ([], True, True, True)
    assert kind.reset_arguments([], {}, 3) == {"prompt": [], "seed": 3}
