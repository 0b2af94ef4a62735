"""What reward functions log arrives, in its place, and what they are told of the run they cannot change."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import RewardConfig
from grpo_cli.reward.hooks import CallLog, Logged, TrainerState, extra_columns, logged_metrics, state_of_run
from grpo_cli.reward.registry import resolve_reward, reward_from_callable
from grpo_cli.reward.scorer import RewardError, Scored, Scorer, ScoringBatch

STATE = TrainerState(global_step=3, max_steps=8)


def batch(count: int = 3) -> ScoringBatch:
    return ScoringBatch(["p"] * count, [f"c{i}" for i in range(count)], [[1]] * count, {})


def judged(*functions: Callable[..., Any], count: int = 3, **changes: Any) -> Scored:
    made = [replace(reward_from_callable(function), **changes) for function in functions]
    return Scorer(made).score_and_log(batch(count), step=4, state=STATE)


def columns_of(scored: Scored, *names: str) -> dict[str, list[Any]]:
    return extra_columns(scored.logged, names, len(scored.rewards))


def shape(completions, trainer_state, log_extra, log_metric):
    log_extra("text", completions)
    log_metric("at", trainer_state.global_step)
    return [1.0] * len(completions)


async def later(completions, trainer_state, log_extra, log_metric):
    await asyncio.sleep(0)
    return shape(completions, trainer_state, log_extra, log_metric)


def deferred(completions, trainer_state, log_extra, log_metric):
    return later(completions, trainer_state, log_extra, log_metric)


class Keeper:
    def __call__(self, completions, trainer_state, log_extra, log_metric):
        return shape(completions, trainer_state, log_extra, log_metric)


@pytest.mark.parametrize("timeout_s", [None, 20.0])
@pytest.mark.parametrize("function", [shape, later, deferred, Keeper()])
def test_functions_of_every_kind_log_and_know_the_step(function: Any, timeout_s: float | None) -> None:
    scored = judged(function, timeout_s=timeout_s)
    name = scored.logged[0].function
    assert columns_of(scored, name) == {"text": ["c0", "c1", "c2"]}
    assert logged_metrics(scored.logged) == {"at": 3.0}


def test_the_state_has_the_names_of_transformers_and_cannot_be_changed() -> None:
    from transformers import TrainerState as Theirs

    names = {field.name for field in dataclasses.fields(TrainerState)}
    assert names <= {field.name for field in dataclasses.fields(Theirs)}

    def cheats(completions, trainer_state):
        trainer_state.global_step = 0

    def invents(completions, trainer_state):
        trainer_state.mine = 0

    with pytest.raises(RewardError, match=r"reward cheats, step 4: .*cannot assign to field 'global_step' at "):
        judged(cheats)
    with pytest.raises(RewardError, match=r"reward invents, step 4: .*cannot assign to field 'mine'"):
        judged(invents)
    assert pickle.loads(pickle.dumps(STATE)) == STATE


def test_what_the_state_lacks_is_named_with_what_it_has() -> None:
    def asks(completions, trainer_state):
        return [trainer_state.log_history[-1]["loss"]]

    with pytest.raises(RewardError, match="trainer_state has no log_history here; it has global_step, max_steps"):
        judged(asks)
    assert not hasattr(STATE, "best_metric")


def test_a_state_counts_from_the_recipe() -> None:
    from grpo_cli.recipe.load import load_recipe

    recipe = load_recipe(
        {
            "model": {"name": "m"},
            "data": {"name": "d"},
            "rewards": ["rewards.length:reward_len"],
            "train": {"output_dir": "o", "max_steps": 5, "prompts_per_step": 4},
            "logging": {"every": 2},
        }
    )
    assert state_of_run(recipe, 8) == TrainerState(0, 5, 0.0, 3, 2)
    assert state_of_run(recipe, 8, 3) == TrainerState(3, 5, 1.5, 3, 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, 2], "was given 2 values for 3 completions"),
        ([1, 2, 3, 4], "was given 4 values for 3 completions"),
        (itertools.repeat(1), "was given 4 or more values for 3 completions"),
        ("abc", "was given a str instead of a list"),
        (None, "was given a NoneType instead of a list"),
        (5, "was given a int instead of a list"),
        ({"a": 1, "b": 2, "c": 3}, "was given a dict instead of a list"),
        (np.float64(3.0), "was given a float64 instead of a list"),
    ],
)
def test_a_column_of_the_wrong_length_or_kind_names_function_and_column(values: Any, said: str) -> None:
    def careless(completions, log_extra):
        log_extra("found", values)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=f"reward careless, step 4: log_extra of 'found' {said}"):
        judged(careless)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_text(name: Any) -> None:
    with pytest.raises(RewardError, match=r"log_extra: .* is no name of a column"):
        judged(lambda completions, log_extra: log_extra(name, completions))
    with pytest.raises(RewardError, match=r"log_metric: .* is no name of a metric"):
        judged(lambda completions, log_metric: log_metric(name, 1.0))


OWN = (
    "step", "reward", "loss", "kl", "rewards/length/mean", "completions/mean_length", "time/judge",
    "tokens_per_second_of_judge", "eval_accuracy", "pass@1", "tools/latency_s", "clip_ratio/low_min",
)  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_metric_with_a_name_of_ours_names_the_function(name: str) -> None:
    def collides(completions, log_metric):
        log_metric(name, 1.0)

    with pytest.raises(
        RewardError, match=f"reward collides, step 4: log_metric: '{name}' is a metric of the run's"
    ):
        judged(collides)


@pytest.mark.parametrize(
    "name", ["accuracy", "rewards/length/share", "completions/with_code", "my_loss", "kl_of_x"]
)
def test_other_names_are_free(name: str) -> None:
    log = CallLog(1)
    log.log_metric(name, 1.0)
    assert logged_metrics([log.taken("f")]) == {name: 1.0}


@pytest.mark.parametrize("value", ["1", None, [1.0], torch.ones(1), 1j])
def test_a_metric_is_one_number(value: Any) -> None:
    def odd(completions, log_metric):
        log_metric("odd", value)

    with pytest.raises(RewardError, match=r"reward odd, step 4: log_metric of 'odd' was given .* is not a number"):
        judged(odd)


def test_numbers_of_other_libraries_are_numbers() -> None:
    log = CallLog(3)
    for name, value in {"a": np.float32(0.5), "b": torch.tensor(2), "c": True, "d": np.array(3)}.items():
        log.log_metric(name, value)
    log.log_extra("array", np.array([1, 2, 3]))
    log.log_extra("tensor", torch.tensor([0.5, 1.5, 2.5]))
    log.log_extra("tuple", (np.float64(1.0), torch.tensor(2), None))
    log.log_extra("made", (i > 0 for i in range(3)))
    taken = log.taken("f")
    assert logged_metrics([taken]) == {"a": 0.5, "b": 2.0, "c": 1.0, "d": 3.0}
    assert taken.extras == {
        "array": [1, 2, 3],
        "tensor": [0.5, 1.5, 2.5],
        "tuple": [1.0, 2, None],
        "made": [False, True, True],
    }


def test_what_is_no_number_and_no_text_is_json() -> None:
    log = CallLog(5)
    log.log_extra("any", [{"ä": [1, None]}, (1, 2), 2**63, "\ud800x", object])
    assert log.extras["any"] == ['{"ä": [1, null]}', "[1, 2]", str(2**63), "?x", "\"<class 'object'>\""]


def test_what_json_cannot_hold_is_as_python_writes_it() -> None:
    itself: list[Any] = []
    itself.append(itself)
    log = CallLog(3)
    log.log_extra("any", [{(1, 2): 3}, itself, Order("tea")])
    assert log.extras["any"] == ["{(1, 2): 3}", "[[...]]", '"an order of tea"']


class Order:
    """Has an `item`, as numbers of other libraries do, and is none."""

    def __init__(self, item: str) -> None:
        self.item = item

    def __str__(self) -> str:
        return f"an order of {self.item}"


def test_names_can_be_written_to_files() -> None:
    log = CallLog(1)
    log.log_extra("a\ud800", [1])
    log.log_metric("b\udfff", 1)
    assert (log.extras, log.metrics) == ({"a?": [1]}, [("b?", 1.0)])


def test_values_that_are_not_finite_are_not_hidden_in_a_mean() -> None:
    for values in ([math.nan, 1.0], [math.inf, -math.inf], [math.inf]):
        calls = [Logged("f", range(2), {}, [("m", value)]) for value in values]
        assert math.isnan(logged_metrics(calls)["m"])


def test_a_mean_weighs_completions_and_does_not_depend_on_the_order_of_calls() -> None:
    calls = [Logged("f", range(n), {}, [("m", 0.1 * n), ("n", 1.0)]) for n in (1, 2, 4)]
    calls += [Logged("g", range(7), {}, [("m", 1e9), ("m", -1e9)])]
    means = [logged_metrics(order) for order in itertools.permutations(calls)]
    assert all(mean == means[0] for mean in means)
    assert means[0]["m"] == pytest.approx((0.1 + 0.4 + 1.6) / 21)
    assert means[0]["n"] == 1.0


def test_of_several_functions_with_one_column_the_last_has_the_word_where_it_has_spoken() -> None:
    calls = [
        Logged("second", [1, 2], {"word": ["B1", "B2"]}, []),
        Logged("first", [0, 1], {"word": ["A0", "A1"], "also": [1, 2]}, []),
    ]
    for order in itertools.permutations(calls):
        columns = extra_columns(order, ["first", "second"], 4)
        assert columns == {"also": [1, 2, None, None], "word": ["A0", "B1", "B2", None]}


def test_a_call_that_fails_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fails(completions, log_extra, log_metric):
        log_extra("half", completions)
        log_metric("half", 1.0)
        raise KeyError("other half")

    with caplog.at_level(logging.WARNING, logger="grpo_cli"):
        scored = judged(fails, shape, on_error="none")
    assert [one.function for one in scored.logged] == ["shape"]


def test_what_a_call_logs_after_its_time_is_not_heard() -> None:
    gate, ended = threading.Event(), threading.Semaphore(0)

    def slow(completions, log_extra, log_metric):
        assert gate.wait(20)
        log_extra("late", completions)
        log_metric("late", 1.0)
        ended.release()
        return [1.0] * len(completions)

    def leaves_work_behind(completions, log_extra, log_metric):
        def work():
            assert gate.wait(20)
            log_extra("late", completions)
            log_metric("late", 1.0)
            ended.release()

        log_metric("early", 2.0)
        threading.Thread(target=work, daemon=True).start()
        return [1.0] * len(completions)

    of_slow = judged(slow, timeout_s=0.05, on_error="none")
    of_other = judged(leaves_work_behind)
    gate.set()
    assert ended.acquire(timeout=20)
    assert ended.acquire(timeout=20)
    assert of_slow.logged == []
    assert logged_metrics(of_other.logged) == {"early": 2.0}
    assert columns_of(of_other, "leaves_work_behind") == {}


def test_the_arguments_cannot_be_set_in_a_recipe() -> None:
    config = RewardConfig(path="tests.reward.test_hooks:shape", params={"log_metric": 1})
    with pytest.raises(UserError, match="log_metric cannot be in params: every call is given its own"):
        resolve_reward(config, "rewards.0")


def test_a_function_that_looks_at_environments_logs_too() -> None:
    def points(environments, trainer_state, log_extra):
        log_extra("points", environments)
        return [float(one + trainer_state.global_step) for one in environments]

    played = replace(batch(2), environments=[5, 6])
    scored = Scorer([reward_from_callable(points)]).score_and_log(played, step=4, state=STATE)
    assert scored.rewards.tolist() == [[8.0], [9.0]]
    assert columns_of(scored, "points") == {"points": [5, 6]}
