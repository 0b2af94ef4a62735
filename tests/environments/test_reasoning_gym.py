"""reasoning-gym's tasks are rows and a reward, the same in every process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from environments.reasoning_gym import dataset, score
from grpo_cli.data.rows import load_rows
from grpo_cli.errors import UserError
from grpo_cli.recipe.data_config import EvalDataConfig
from grpo_cli.recipe.schema import RewardConfig
from grpo_cli.reward.registry import check_columns, resolve_rewards
from grpo_cli.reward.scorer import Scorer, ScoringBatch

PARAMS = {"name": "leg_counting", "size": 5, "seed": 1}


def scored(rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    return score(texts, [row["gym"] for row in rows], [row["gym_row"] for row in rows])


def test_the_seed_makes_the_rows() -> None:
    rows = dataset(**PARAMS)
    assert rows == dataset(**PARAMS)
    assert len({row["prompt"] for row in rows}) == 5
    other = dataset("leg_counting", size=5, seed=1000)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}


@pytest.mark.parametrize("name", ["leg_counting", "chain_sum", "countdown", "sudoku", "word_ladder"])
def test_the_right_answer_is_worth_more_than_a_wrong_one_or_none(name: str) -> None:
    rows = dataset(name, size=2, seed=1)
    right = scored(rows, [f"I think <answer>{row['ground_truth']}</answer>" for row in rows])
    wrong = scored(rows, ["<answer>banana</answer>"] * 2)
    assert right == [1.0, 1.0]
    assert max(wrong) < 0.5
    assert max(scored(rows, [row["ground_truth"] for row in rows])) <= 0.01, "no answer is marked as such"


def test_the_last_answer_of_a_conversation_counts() -> None:
    (row, *_) = dataset(**PARAMS)
    messages = [
        {"role": "assistant", "content": "<answer>7</answer>"},
        {"role": "user", "content": f"<answer>{row['ground_truth']}</answer>"},
        {"role": "assistant", "content": f"<answer> {row['ground_truth']} </answer>"},
    ]
    assert score([messages], [row["gym"]], [row["gym_row"]]) == [1.0]
    assert score([messages[:2]], [row["gym"]], [row["gym_row"]]) == [0.0]


def test_data_and_reward_of_a_recipe_fit_together() -> None:
    rows = load_rows(EvalDataConfig(name="environments.reasoning_gym:dataset", params=PARAMS))
    functions = resolve_rewards([RewardConfig(path="environments.reasoning_gym:score")])
    check_columns(functions, rows.columns, "data")
    columns = rows.row_columns(3)
    answer = f"<answer>{columns['ground_truth']}</answer>"
    batch = ScoringBatch([rows.content(3)], [answer], [[1]], {name: [value] for name, value in columns.items()})
    assert Scorer(functions).score(batch, step=1).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"name": "leg"}, "reasoning-gym has no task 'leg'; it has .*leg_counting"),
        ({"name": "leg_counting", "min_animals": 0}, "does not take these settings: min_animals must be positive"),
        ({"name": "leg_counting", "animals": 1}, "does not take these settings: .*argument 'animals'"),
        ({}, r"data\.params: .*missing a required argument: 'name'"),
    ],
)
def test_wrong_parameters_end_in_one_message(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rows(EvalDataConfig(name="environments.reasoning_gym:dataset", params=params))


@pytest.mark.slow
def test_another_process_gives_the_same_scores() -> None:
    answers = [f"<answer>{row['ground_truth']}</answer>" for row in dataset("word_ladder", size=3, seed=1)]
    code = (
        "from environments.reasoning_gym import dataset, score\n"
        "rows = dataset('word_ladder', size=3, seed=1)\n"
        f"print(score({answers!r}, [row['gym'] for row in rows], [row['gym_row'] for row in rows]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[1.0, 1.0, 1.0]"
