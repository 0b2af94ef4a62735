"""reasoning-gym's tasks (`pip install grpo-cli[gym]`): a data source and its reward in one, without a network.

reasoning-gym makes its rows from a seed, so a row says how it was made and not what its task would need to judge
an answer: that may be any Python object, which a table cannot hold. The reward makes the same row again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

from rewards.text import Completion, completion_text


def dataset(name: str, size: int = 500, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """Rows of one of reasoning-gym's tasks.

    Args:
        name: of the task: `leg_counting`.
        size: number of rows.
        seed: of its random numbers; the same seed makes the same rows. Most tasks make row i of seed + i, so two
            seeds that are not `size` apart have rows in common: take one far away for evaluation.
        settings: of the task, such as `min_animals: 2`; its `Config` class has them.

    Returns:
        Rows with `prompt`, `ground_truth` (an answer; there may be other right ones), `gym` (how the rows were
        made, as JSON) and `gym_row`.

    Raises:
        ValueError: there is no such task, or it does not take the settings.
    """
    made_of = json.dumps({"name": name, "size": size, "seed": seed, **settings}, sort_keys=True)
    task = _task(made_of)
    return [
        {
            "prompt": (entry := _entry(made_of, row))["question"],
            "ground_truth": str(entry["answer"]),
            "gym": made_of,
            "gym_row": row,
        }
        for row in range(len(task))
    ]


def score(completions: Sequence[Completion], gym: Sequence[str], gym_row: Sequence[int], **_: Any) -> list[float]:
    """What the task gives to each answer, from 0 to 1: its own `score_answer`.

    The answer is what stands in the last `<answer>…</answer>`, as in reasoning-gym. Without one there is none,
    which is worth 0, or what the task gives for that (0.01 in some).

    Args:
        completions: what the model wrote.
        gym: the column of `dataset`.
        gym_row: the column of `dataset`.
    """
    return [
        float(_task(made_of).score_answer(extract_answer(completion_text(completion)), _entry(made_of, row)))
        for completion, made_of, row in zip(completions, gym, gym_row, strict=True)
    ]


@lru_cache(maxsize=64)
def _task(made_of: str) -> Any:
    settings = json.loads(made_of)
    name = settings.pop("name")
    if name not in reasoning_gym.factory.DATASETS:
        known = ", ".join(sorted(reasoning_gym.factory.DATASETS))
        raise ValueError(f"reasoning-gym has no task {name!r}; it has {known}")
    try:
        return reasoning_gym.create_dataset(name, **settings)
    except (TypeError, AssertionError) as error:  # it validates with assert
        raise ValueError(f"reasoning-gym's {name} does not take these settings: {error}") from error


@lru_cache(maxsize=4096)
def _entry(made_of: str, row: int) -> Any:
    return _task(made_of)[row]
