from __future__ import annotations

import asyncio
import gc
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo_cli.errors import StoppedEarly, UserError
from grpo_cli.reward import scorer as scorer_module
from grpo_cli.reward.hooks import NO_RUN
from grpo_cli.reward.registry import RewardFunction, reward_from_callable
from grpo_cli.reward.scorer import RewardError, Scorer, ScoringBatch

HERE = str(Path(__file__))


def batch(count: int = 3, **columns: list[Any]) -> ScoringBatch:
    return ScoringBatch(
        prompts=[f"prompt {i}" for i in range(count)],
        completions=[f"completion {i}" for i in range(count)],
        completion_ids=[[i, i + 1] for i in range(count)],
        columns=columns,
    )


def reward(function: Callable[..., Any], **changes: Any) -> RewardFunction:
    return replace(reward_from_callable(function, name=changes.pop("name", None)), **changes)


def score(function: Callable[..., Any], given: ScoringBatch | None = None, **changes: Any) -> np.ndarray:
    return Scorer([reward(function, **changes)]).score(given or batch(), step=7)


def error_of(function: Callable[..., Any], given: ScoringBatch | None = None, **changes: Any) -> RewardError:
    with pytest.raises(RewardError) as caught:
        score(function, given, **changes)
    return caught.value


def returning(value: Any) -> Callable[..., Any]:
    def fixed(**_: Any) -> Any:
        return value

    return fixed


def test_the_matrix_has_a_row_per_completion_and_a_column_per_function() -> None:
    scorer = Scorer(
        [reward(returning([1, 2, 3]), name="a"), reward(returning([4, None, 6]), name="b", weight=0.5)]
    )
    scores = scorer.score(batch(), step=0)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [[1, 4], [2, np.nan], [3, 6]])
    assert (scorer.names, scorer.weights) == (["a", "b"], [1.0, 0.5])


def test_no_completions_give_an_empty_matrix() -> None:
    assert Scorer([reward(returning([]))]).score(batch(0), step=0).shape == (0, 1)


def test_two_functions_of_one_name_are_an_error() -> None:
    with pytest.raises(UserError, match="more than one is named fixed"):
        Scorer([reward(returning([])), reward(returning([]))])


def test_a_batch_whose_lists_differ_in_length_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="answer has 2 entries for 3 completions"):
        batch(3, answer=[1, 2])


# What a function is called with


def test_a_function_with_kwargs_gets_every_column() -> None:
    seen: dict[str, Any] = {}

    def greedy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * 3

    given = batch(3, answer=[1, 2, 3], level=["a", "b", "c"])
    score(greedy, given)
    assert seen == {
        "prompts": given.prompts,
        "completions": given.completions,
        "completion_ids": given.completion_ids,
        "answer": [1, 2, 3],
        "level": ["a", "b", "c"],
        "trainer_state": NO_RUN,
        "log_extra": seen["log_extra"],
        "log_metric": seen["log_metric"],
    }


def test_a_function_without_kwargs_gets_only_what_it_accepts() -> None:
    def modest(completions: list[str], answer: list[int], extra: str = "default") -> list[float]:
        assert extra == "default"
        return [float(a) for a in answer]

    np.testing.assert_array_equal(score(modest, batch(3, answer=[1, 2, 3], level=[0, 0, 0]))[:, 0], [1, 2, 3])


def test_a_column_cannot_take_the_place_of_the_completions() -> None:
    def check(completions: list[str], **_: Any) -> list[float]:
        return [float(len(c)) for c in completions]

    assert score(check, batch(1, completions=["impostor"]))[0, 0] == len("completion 0")


@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_a_function_that_changes_its_arguments_disturbs_nobody(timeout_s: float | None) -> None:
    given = ScoringBatch(
        prompts=[[{"role": "user", "content": "hi"}]],
        completions=[[{"role": "assistant", "content": "ho"}]],
        completion_ids=[[1, 2]],
        columns={"tests": [["a", "b"]]},
    )

    def vandal(prompts: Any, completions: Any, completion_ids: Any, tests: Any) -> list[float]:
        prompts[0].append("x")
        completions[0][0]["content"] = ""
        completions.append("x")
        completion_ids[0].pop()
        tests[0].clear()
        prompts.clear()
        return [0.0]

    def witness(prompts: Any, completions: Any, completion_ids: Any, tests: Any) -> list[float]:
        assert prompts == [[{"role": "user", "content": "hi"}]]
        assert completions == [[{"role": "assistant", "content": "ho"}]]
        assert (completion_ids, tests) == ([[1, 2]], [["a", "b"]])
        return [1.0]

    functions = [reward(vandal, timeout_s=timeout_s), reward(witness)]
    assert Scorer(functions).score(given, step=0).tolist() == [[0.0, 1.0]]
    assert (given.completion_ids, given.columns) == ([[1, 2]], {"tests": [["a", "b"]]})
    assert given.completions == [[{"role": "assistant", "content": "ho"}]]


# Running together


def test_plain_functions_run_in_order_on_the_calling_thread() -> None:
    ran: list[tuple[str, int]] = []

    def make(name: str) -> Callable[..., list[float]]:
        def function(**_: Any) -> list[float]:
            ran.append((name, threading.get_ident()))
            return [0.0] * 3

        return function

    Scorer([reward(make(name), name=name) for name in "abc"]).score(batch(), step=0)
    assert ran == [(name, threading.get_ident()) for name in "abc"]


def test_async_functions_wait_together() -> None:
    barrier = asyncio.Barrier(3)

    async def meet(completions: list[str], **_: Any) -> list[float]:
        async with asyncio.timeout(5):
            await barrier.wait()
        return [1.0 for _ in completions]

    functions = [reward(meet, name=name) for name in "abc"]
    np.testing.assert_array_equal(Scorer(functions).score(batch(), step=0), np.ones((3, 3)))


def test_async_and_timed_functions_run_beside_a_plain_one() -> None:
    barrier = threading.Barrier(2, timeout=5)
    started = threading.Event()

    def plain(**_: Any) -> list[float]:
        barrier.wait()
        assert started.wait(5)
        return [0.0] * 3

    def timed(**_: Any) -> list[float]:
        barrier.wait()
        return [0.0] * 3

    async def slow(**_: Any) -> list[float]:
        started.set()
        return [0.0] * 3

    functions = [reward(plain), reward(timed, timeout_s=10.0), reward(slow)]
    assert not np.isnan(Scorer(functions).score(batch(), step=0)).any()


def test_an_async_function_works_inside_a_running_event_loop() -> None:
    async def slow(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [2.0 for _ in completions]

    async def notebook() -> np.ndarray:
        return score(slow)

    assert asyncio.run(notebook()).tolist() == [[2.0]] * 3


def test_the_event_loop_stays_from_step_to_step() -> None:
    loops: list[Any] = []

    async def remember(completions: list[str], **_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0 for _ in completions]

    scorer = Scorer([reward(remember)])
    scorer.score(batch(), step=0)
    scorer.score(batch(), step=1)
    assert loops[0] is loops[1]


def test_the_event_loop_ends_with_its_scorer() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def remember(**_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * 3

    scorer = Scorer([reward(remember)])
    scorer.score(batch(), step=0)
    del scorer
    gc.collect()
    deadline = time.monotonic() + 5
    while not loops[0].is_closed() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loops[0].is_closed()


@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_async_call_and_functions_that_return_awaitables_work(timeout_s: float | None) -> None:
    class Judge:
        async def __call__(self, completions: list[str], **_: Any) -> list[float]:
            await asyncio.sleep(0)
            return [3.0 for _ in completions]

    judge = Judge()
    assert score(judge, timeout_s=timeout_s).tolist() == [[3.0]] * 3
    assert score(lambda **kwargs: judge(**kwargs), timeout_s=timeout_s).tolist() == [[3.0]] * 3


# Timeouts

TIMEOUT = "reward hang, step 7: took longer than 0.05 seconds (timeout_s)\n  prompt 0: 'prompt 0'"


@pytest.mark.parametrize("swallow", [False, True])
def test_an_async_function_over_its_timeout_is_an_error(swallow: bool) -> None:
    async def hang(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            if not swallow:
                raise
        return [0.0] * 3

    assert str(error_of(hang, timeout_s=0.05)).startswith(TIMEOUT)


def test_a_plain_function_over_its_timeout_is_abandoned() -> None:
    release = threading.Event()

    def hang(**_: Any) -> list[float]:
        release.wait(30)
        return [0.0] * 3

    began = time.monotonic()
    assert str(error_of(hang, timeout_s=0.05)).startswith(TIMEOUT)
    assert time.monotonic() - began < 5
    release.set()


def test_an_awaitable_of_a_plain_function_counts_towards_its_timeout() -> None:
    async def forever() -> None:
        await asyncio.sleep(30)

    def hang(**_: Any) -> Any:
        return forever()

    assert str(error_of(hang, timeout_s=0.05)).startswith(TIMEOUT)


def test_a_function_that_overran_while_another_was_running_has_timed_out_too() -> None:
    def plain(**_: Any) -> list[float]:
        time.sleep(0.2)
        return [0.0] * 3

    def hang(**_: Any) -> list[float]:
        time.sleep(0.1)
        return [0.0] * 3

    with pytest.raises(RewardError, match=r"took longer than 0\.05 seconds"):
        Scorer([reward(hang, timeout_s=0.05), reward(plain)]).score(batch(), step=7)


def test_an_async_function_that_blocks_the_loop_times_out_and_the_next_step_has_a_new_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorer_module, "GRACE_S", 0.1)
    release, calls = threading.Event(), []

    async def hang(**_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            release.wait(30)
        return [1.0] * 3

    scorer = Scorer([reward(hang, timeout_s=0.5)])
    with pytest.raises(RewardError, match=r"took longer than 0\.5 seconds"):
        scorer.score(batch(), step=7)
    assert scorer.score(batch(), step=8).tolist() == [[1.0]] * 3
    release.set()


def test_a_blocked_loop_that_is_left_still_ends_the_calls_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "GRACE_S", 0.1)
    waiting, release = threading.Event(), threading.Event()

    async def patient(**_: Any) -> list[float]:
        waiting.set()
        while not release.is_set():
            await asyncio.sleep(0)
        for _ in range(100):  # over the rounds in which the loop notices that it was left
            await asyncio.gather(asyncio.sleep(0))
        return [2.0] * 3

    async def block(**_: Any) -> list[float]:
        release.wait(30)
        return [1.0] * 3

    scorer = Scorer([reward(patient), reward(block, timeout_s=0.05)])
    results: list[Any] = []
    other = threading.Thread(
        target=lambda: results.append(scorer.only([0]).score(batch(), step=7).tolist()), daemon=True
    )
    other.start()
    assert waiting.wait(5)
    with pytest.raises(RewardError, match=r"took longer than 0\.05 seconds"):
        scorer.only([1]).score(batch(), step=7)
    release.set()
    other.join(5)
    assert results == [[[2.0]] * 3]


def test_threads_that_score_at_the_same_time_share_one_event_loop() -> None:
    loops: list[Any] = []
    barrier = threading.Barrier(8)

    async def remember(**_: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * 3

    scorer = Scorer([reward(returning([1, 2, 3])), reward(remember)])

    def score_with_others() -> np.ndarray:
        barrier.wait(5)
        return scorer.only([1]).score(batch(), step=7)

    with ThreadPoolExecutor(8) as pool:
        results = [call.result(5) for call in [pool.submit(score_with_others) for _ in range(8)]]
    assert all(result.tolist() == [[0.0]] * 3 for result in results)
    assert len(loops) == 8
    assert len(set(loops)) == 1


def test_a_timeout_of_the_functions_own_is_reported_as_its_exception() -> None:
    async def impatient(**_: Any) -> list[float]:
        raise TimeoutError("judge did not answer")

    assert "raised TimeoutError: judge did not answer at " in str(error_of(impatient, timeout_s=5.0))


def test_a_timeout_with_on_error_none_leaves_the_column_empty() -> None:
    async def hang(**_: Any) -> list[float]:
        await asyncio.sleep(30)
        return [0.0] * 3

    assert np.isnan(score(hang, timeout_s=0.05, on_error="none")).all()


# What comes back


class Celsius:
    def __float__(self) -> float:
        return 1.5


@pytest.mark.parametrize(
    "value",
    [
        [1, 0.5, None],
        (1, 0.5, None),
        np.array([1, 0.5, None], dtype=object),
        iter([1, 0.5, None]),
        [True, np.float32(0.5), None],
        [torch.tensor(1), torch.tensor(0.5, dtype=torch.bfloat16), None],
        [np.int64(1), np.array(0.5), None],
        [Decimal(1), Decimal("0.5"), None],
    ],
)
def test_numbers_of_every_kind_are_taken(value: Any) -> None:
    np.testing.assert_array_equal(score(returning(value))[:, 0], [1, 0.5, np.nan])


def test_whole_arrays_and_tensors_are_taken() -> None:
    assert score(returning(np.arange(3)))[:, 0].tolist() == [0, 1, 2]
    assert score(returning(torch.arange(3, dtype=torch.bfloat16, requires_grad=True)))[:, 0].tolist() == [
        0,
        1,
        2,
    ]
    assert score(returning([Celsius()] * 3))[:, 0].tolist() == [1.5] * 3


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "returned None instead of a list"),
        ("abc", "returned a str instead of a list"),
        (b"abc", "returned a bytes instead of a list"),
        ({0: 1, 1: 2, 2: 3}, "returned a dict instead of a list"),
        ({1.0, 2.0, 3.0}, "returned a set instead of a list"),
        (1.0, "returned a float instead of a list"),
        (torch.tensor(1.0), "returned a Tensor instead of a list"),
        ([1.0, 2.0], "returned 2 values for 3 completions"),
        ([1.0] * 40, "returned 40 values for 3 completions"),
        (iter(lambda: 1.0, None), "returned 4 or more values for 3 completions"),
        ([1.0, "2", 3.0], "value 1 is a str, not a number: '2'"),
        ([1.0, [2.0], 3.0], "value 1 is a list, not a number: [2.0]"),
        ([1.0, 2j, 3.0], "value 1 is a complex, not a number: 2j"),
        ([1.0, np.complex128(2j), 3.0], "value 1 is a complex128, not a number"),
        ([1.0, np.datetime64("2020"), 3.0], "value 1 is a datetime64, not a number"),
        ([1.0, torch.ones(1), 3.0], "value 1 is a Tensor of shape (1,), not a number"),
        (torch.ones(3, 1), "value 0 is a list, not a number: [1.0]"),
        ([1.0, 10**400, 3.0], "value 1 is not a number: int too large to convert to float"),
        ([1.0, math.nan, 3.0], "value 1 is nan; return None for 'does not apply'"),
        ([1.0, -math.inf, 3.0], "value 1 is -inf, not a finite number"),
    ],
)
def test_anything_else_is_an_error_that_says_what_came_back(value: Any, told: str) -> None:
    message = str(error_of(returning(value)))
    assert message.startswith(f"reward fixed, step 7: {told}")


def test_the_error_shows_the_sample_that_it_is_about_shortened() -> None:
    given = replace(batch(), completions=["a", "b" * 500 + "end", "c"])
    lines = str(error_of(returning([1.0, math.nan, 1.0]), given)).splitlines()
    assert lines[1] == "  prompt 1: 'prompt 1'"
    assert lines[2].startswith("  completion 1: 'bbb")
    assert lines[2].endswith("bbend'")
    assert len(lines[2]) < 230


def raising(**_: Any) -> list[float]:
    raise KeyError("answer")


async def raising_async(**_: Any) -> list[float]:
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("function", "timeout_s"), [(raising, None), (raising, 5.0), (raising_async, None), (raising_async, 5.0)]
)
def test_an_exception_is_told_with_type_message_and_line_and_kept_as_the_cause(
    function: Callable[..., Any], timeout_s: float | None
) -> None:
    error = error_of(function, timeout_s=timeout_s)
    line = function.__code__.co_firstlineno + 1
    told = f"reward {function.__name__}, step 7: raised KeyError: 'answer' at {HERE}:{line}\n"
    assert str(error).startswith(told + "  prompt 0: 'prompt 0'")
    assert isinstance(error.__cause__, KeyError)


def test_an_exception_in_a_generator_is_the_functions_own() -> None:
    def lazy(completions: list[str]) -> Any:
        for _ in completions:
            yield 1 / 0

    assert "raised ZeroDivisionError: division by zero at " in str(error_of(lazy))


def test_a_call_without_a_required_column_names_it() -> None:
    def needs(completions: list[str], answer: list[str]) -> list[float]:
        return [0.0 for _ in completions]

    assert "raised TypeError: " in str(error_of(needs))
    assert "'answer'\n" in str(error_of(needs))


@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_a_completion_that_calls_exit_does_not_end_the_run_silently(timeout_s: float | None) -> None:
    def execute(**_: Any) -> list[float]:
        raise SystemExit(0)

    assert "raised SystemExit: 0 at " in str(error_of(execute, timeout_s=timeout_s))


def test_a_cancelled_task_is_an_error_of_the_function() -> None:
    async def cancelled(**_: Any) -> list[float]:
        raise asyncio.CancelledError

    assert "raised CancelledError" in str(error_of(cancelled))


@pytest.mark.parametrize("kind", ["plain", "timed", "async"])
@pytest.mark.parametrize("signal", [KeyboardInterrupt, StoppedEarly])
def test_an_interrupt_is_never_swallowed(kind: str, signal: type[BaseException]) -> None:
    def interrupted(**_: Any) -> list[float]:
        raise signal

    async def interrupted_async(**_: Any) -> list[float]:
        raise signal

    function = interrupted_async if kind == "async" else interrupted
    with pytest.raises(signal):
        score(function, on_error="none", timeout_s=5.0 if kind == "timed" else None)


# on_error


def test_on_error_none_leaves_the_column_empty_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    functions = [reward(raising, on_error="none"), reward(returning([1, 2, 3]))]
    with caplog.at_level(logging.WARNING, logger="grpo_cli"):
        scores = Scorer(functions).score(batch(), step=7)
    assert np.isnan(scores[:, 0]).all()
    assert scores[:, 1].tolist() == [1, 2, 3]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("grpo_cli", "WARNING")
    assert record.getMessage() == str(error_of(raising))


def test_on_error_none_covers_values_that_are_not_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="grpo_cli"):
        assert np.isnan(score(returning([1.0, math.nan, 2.0]), on_error="none")).all()
    assert "value 1 is nan" in caplog.text


def test_a_message_with_percent_signs_is_logged_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    given = replace(batch(), prompts=["100%s %d", "", ""])
    with caplog.at_level(logging.WARNING, logger="grpo_cli"):
        score(raising, given, on_error="none")
    assert "100%s %d" in caplog.text


def test_a_failure_ends_what_still_runs_on_the_loop() -> None:
    cancelled, started = threading.Event(), threading.Event()

    async def waiting(**_: Any) -> list[float]:
        started.set()
        try:
            await asyncio.sleep(30)
        finally:
            cancelled.set()
        return [0.0] * 3

    def fails(**_: Any) -> list[float]:
        assert started.wait(5)
        raise ValueError("no")

    scorer = Scorer([reward(waiting), reward(fails)])
    with pytest.raises(RewardError, match="reward fails, step 7: raised ValueError: no"):
        scorer.score(batch(), step=7)
    assert cancelled.wait(5)
