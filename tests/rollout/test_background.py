"""Scoring while others generate gives what scoring at once gives, and fails as it does."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.data.prompts import Prompt
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.reward.hooks import TrainerState, extra_columns, logged_metrics
from grpo_cli.reward.registry import RewardFunction, reward_from_callable
from grpo_cli.reward.scorer import RewardError, Scored, Scorer
from grpo_cli.rollout.background import BackgroundScorer
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey
from grpo_cli.rollout.rollout import Rollout, generate_rollout

PATIENCE_S = 20.0
"""How long a test waits for another thread before it fails."""


def rollout(groups: int = 4, size: int = 2) -> Rollout:
    prompts = [Prompt(i, f"p{i}", [i + 1], {"answer": f"a{i}"}) for i in range(groups)]
    completions = [
        Completion([i, j], [0.0, 0.0], "stop", f"text {i} {j}") for i in range(groups) for j in range(size)
    ]
    return Rollout(prompts, completions, size)


def reward(function: Callable[..., Any], **changes: Any) -> RewardFunction:
    return replace(reward_from_callable(function, name=changes.pop("name", None)), **changes)


def background_of(*functions: RewardFunction) -> BackgroundScorer:
    return BackgroundScorer(Scorer(functions), Ranks())


class Calls:
    """A reward function that keeps what it was called with and where, and waits while `gate` is closed."""

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []
        self.threads: set[threading.Thread] = set()
        self.began, self.gate = threading.Semaphore(0), threading.Event()
        self.gate.set()

    def __call__(self, prompts: list[str]) -> list[float]:
        self.prompts.append(prompts)
        self.threads.add(threading.current_thread())
        self.began.release()
        assert self.gate.wait(PATIENCE_S)
        return [float(prompt[1:]) for prompt in prompts]


class Engine:
    """Hands out its groups in an order of its own, and calls `before(i)` before it hands out group i."""

    def __init__(self, order: Sequence[int], before: Callable[[int], None] = lambda index: None) -> None:
        self.order, self.before = order, before

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        whole = rollout(len(prompts), num_generations)
        groups = [whole.group(index).completions for index in range(len(prompts))]
        for index in self.order:
            self.before(index)
            assert on_group is not None
            on_group(index, groups[index])
        return groups


def centred(completions: list[str], answer: list[str]) -> list[float | None]:
    """Compares the completions of a group."""
    values = [sum(map(ord, text)) for text in completions]
    starts = [answer.index(its) for its in answer]
    return [
        None if text.endswith("1 0") else float(values[i] - values[starts[i]])
        for i, text in enumerate(completions)
    ]


async def slowly(prompts: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(prompt)) for prompt in prompts]


def short(prompts: list[str]) -> list[float]:
    return [1.0]


def broken(prompts: list[str]) -> list[float]:
    raise KeyError(prompts[0])


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 5), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_the_matrix_is_that_of_scoring_at_once_whatever_finishes_first(
    order: list[int], added: int, workers: list[int]
) -> None:
    functions = [
        reward(centred, workers=workers[0]),
        reward(slowly, workers=workers[1]),
        reward(centred, name="timed", timeout_s=PATIENCE_S, workers=workers[2]),
        reward(short, on_error="none", workers=workers[3]),
    ]
    whole = rollout(5, 3)
    with background_of(*functions).begin(1) as scores:
        for index in order[:added]:
            scores.add(index, whole.group(index))
        result = scores.result(whole)
    np.testing.assert_array_equal(result, Scorer(functions).score(whole.scoring_batch(), step=1))


def noted(completions: list[str], log_extra: Any, log_metric: Any, trainer_state: TrainerState) -> list[float]:
    """Logs of each completion what is its own, and a number that depends on how it is called."""
    log_extra("text", completions)
    log_extra("step", [trainer_state.global_step] * len(completions))
    log_metric("last", float(completions[-1].replace("text", "").replace(" ", "")))
    return [0.0] * len(completions)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_what_is_logged_lands_at_its_completion_whatever_finishes_first(
    order: list[int], added: int, workers: int, is_timed: bool
) -> None:
    whole = rollout(5, 3)
    function = reward(noted, workers=workers, timeout_s=PATIENCE_S if is_timed else None)
    with background_of(reward(slowly), function).begin(1, TrainerState(global_step=7)) as scores:
        for index in order[:added]:
            scores.add(index, whole.group(index))
        scores.result(whole)
    texts = [completion.text for completion in whole.completions]
    assert extra_columns(scores.logged, ["slowly", "noted"], scores.count) == {"step": [7] * 15, "text": texts}
    assert logged_metrics(scores.logged) == {"last": pytest.approx((2 + 12 + 22 + 32 + 42) / 5 if workers else 42)}


class OneOfMany(Ranks):
    """A rank that remembers what it gives, and gets what all have given."""

    def __init__(self, rank: int, said: list[Any], led: list[Any]) -> None:
        super().__init__(rank, world_size=3)
        self.said = said
        self.led_before = led

    def led(self, work: Callable[[], Any]) -> Any:
        if self.is_main:
            self.led_before.append(work())
        return self.led_before[-1]

    def gather(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        return self.said


@pytest.mark.parametrize("groups", [1, 3, 5, 7])
def test_groups_are_scored_by_their_ranks_and_what_sees_all_on_the_first(groups: int) -> None:
    whole, scored, model, at_once = rollout(groups), Calls(), Calls(), Calls()
    model.scores_each_alone = True  # type: ignore[attr-defined]
    functions = [
        reward(centred),
        reward(scored, workers=1),
        reward(model, name="model"),
        reward(at_once, name="all"),
    ]
    others = [reward(Calls(), name=name) for name in "abc"]
    expected = Scorer([reward(centred), *others]).score(whole.scoring_batch(), step=1)
    said: list[Any] = [Scored(np.zeros((len(range(rank, groups, 3)) * 2, 2)), []) for rank in range(3)]
    led: list[Any] = []
    for rank in range(3):
        for calls in (scored, model, at_once):
            calls.prompts.clear()
        with BackgroundScorer(Scorer(functions), OneOfMany(rank, said, led)).begin(1) as scores:
            for index in range(groups):
                scores.add(index, whole.group(index))
            result = scores.result(whole)
        own = [f"p{index}" for index in range(rank, groups, 3) for _ in range(2)]
        assert sorted(scored.prompts) == [[prompt, prompt] for prompt in own[::2]]
        assert model.prompts == ([own] if own else [])
        assert at_once.prompts == ([[f"p{index // 2}" for index in range(2 * groups)]] if rank == 0 else [])
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_environments_are_asked_on_the_rank_that_played_with_them(workers: int) -> None:
    whole = rollout(5)
    expected = [[float(ord(one.text[-1]) + 10 * one.token_ids[0])] for one in whole.completions]

    def points(environments: list[list[float] | None]) -> list[float]:
        assert None not in environments, "those of other ranks stay there"
        return [environment[0] for environment in environments if environment is not None]

    def of_rank(rank: int) -> Rollout:
        def seen(place: int, one: Completion) -> Completion:
            own = expected[place] if place // 2 % 3 == rank else None
            return replace(one, messages=[{"role": "assistant", "content": one.text}], environment=own)

        return replace(whole, completions=[seen(place, one) for place, one in enumerate(whole.completions)])

    said: list[Any] = [Scored(np.zeros((len(range(rank, 5, 3)) * 2, 1)), []) for rank in range(3)]
    for rank in range(3):
        scorer = Scorer([reward(points, workers=workers)])
        with BackgroundScorer(scorer, OneOfMany(rank, said, [])).begin(1) as scores:
            result = scores.result(of_rank(rank))
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("lost", [None, 3])
@pytest.mark.parametrize("kind", ["at once", "workers", "each alone"])
def test_what_any_rank_has_logged_is_known_to_all(kind: str, lost: int | None) -> None:
    groups = [rollout(5, 3).group(index) for index in range(5)]
    if lost is not None:
        gone = [replace(one, finish_reason="lost") for one in groups[lost].completions]
        groups[lost] = replace(groups[lost], completions=gone)
    whole = Rollout.joined(groups)

    def function(completions: list[str], log_extra: Any, log_metric: Any, trainer_state: Any) -> list[float]:
        return noted(completions, log_extra, log_metric, trainer_state)

    function.scores_each_alone = kind == "each alone"  # type: ignore[attr-defined]
    scorer = Scorer([reward(function, name="noted", workers=2 if kind == "workers" else 0)])
    owned = [[index for index in range(rank, 5, 3) if index != lost] for rank in range(3)]
    said: list[Any] = [Scored(np.zeros((3 * len(own), 1)), []) for own in owned]
    led: list[Any] = []
    for rank in (0, 1, 2, 0):  # the last one hears what all have said
        with BackgroundScorer(scorer, OneOfMany(rank, said, led)).begin(1) as scores:
            scores.result(whole)
    texts: list[Any] = [completion.text for completion in whole.completions]
    last = [10 * index + 2 for index in range(5) if index != lost]
    if lost is not None:
        texts[3 * lost : 3 * lost + 3] = [None] * 3
    assert extra_columns(scores.logged, ["noted"], 15)["text"] == texts
    if kind == "workers":
        assert logged_metrics(scores.logged) == {"last": pytest.approx(sum(last) / len(last))}


def test_without_workers_a_function_is_called_once_with_everything_on_the_calling_thread() -> None:
    calls = Calls()
    engine = Engine([2, 0, 1], before=lambda _: pytest.fail("called too early") if calls.prompts else None)
    with background_of(reward(calls)).begin(1) as scores:
        whole = generate_rollout(engine, rollout(3).prompts, (1,), 2, on_group=scores.add)
        assert not calls.prompts
        assert scores.result(whole)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert calls.prompts == [["p0", "p0", "p1", "p1", "p2", "p2"]]
    assert calls.threads == {threading.current_thread()}


def test_a_group_is_scored_while_the_engine_still_generates_others() -> None:
    calls, patient = Calls(), Calls()
    patient.gate.clear()

    def before(index: int) -> None:
        if index != 2:  # the first; from then on each waits for the call of the one before
            assert calls.began.acquire(timeout=PATIENCE_S)

    with background_of(reward(calls, workers=1), reward(patient, name="patient", workers=1)).begin(1) as scores:
        whole = generate_rollout(Engine([2, 0, 1], before), rollout(3).prompts, (1,), 2, on_group=scores.add)
        assert calls.prompts[:2] == [["p2", "p2"], ["p0", "p0"]]
        patient.gate.set()
        assert scores.result(whole)[:, 1].tolist() == [0, 0, 1, 1, 2, 2]
    assert calls.prompts == patient.prompts == [["p2", "p2"], ["p0", "p0"], ["p1", "p1"]], "each group is one call"


@pytest.mark.parametrize("timeout_s", [None, PATIENCE_S])
def test_as_many_calls_run_at_once_as_there_are_workers(timeout_s: float | None) -> None:
    barrier, threads = threading.Barrier(3), set()

    def meet(prompts: list[str]) -> list[float]:
        threads.add(threading.current_thread())
        barrier.wait(PATIENCE_S)
        return [0.0] * len(prompts)

    background_of(reward(meet, workers=3, timeout_s=timeout_s)).begin(1).result(rollout(6))
    if timeout_s is None:  # otherwise each call has a thread of its own
        assert len(threads) == 3


def test_async_calls_of_all_groups_and_steps_share_one_event_loop() -> None:
    loops: set[int] = set()

    async def remember(prompts: list[str]) -> list[float]:
        loops.add(id(asyncio.get_running_loop()))
        return [0.0] * len(prompts)

    background = background_of(reward(remember, workers=4), reward(remember, name="at once"))
    for step in (1, 2):
        background.begin(step).result(rollout(8))
    background.scorer.score(rollout().scoring_batch(), step=2)
    assert len(loops) == 1


def test_the_threads_last_over_steps_and_end_with_the_scorer() -> None:
    calls = Calls()
    background = background_of(reward(calls, workers=1))
    for step in (1, 2):
        background.begin(step).result(rollout())
    del background
    (thread,) = calls.threads
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


# Failures


@pytest.mark.parametrize(
    "function",
    [
        reward(broken, workers=1),
        reward(short, workers=2),
        reward(broken, workers=1, timeout_s=PATIENCE_S),
        reward(lambda prompts: threading.Event().wait(PATIENCE_S), name="hang", workers=1, timeout_s=0.05),
    ],
    ids=["raises", "miscounts", "raises beside a timeout", "times out"],
)
def test_a_failing_call_ends_the_generation_at_the_next_group_with_the_usual_message(
    function: RewardFunction,
) -> None:
    whole = rollout(3)
    with pytest.raises(RewardError) as usual:
        Scorer([function]).score(whole.group(2).scoring_batch(), step=3)
    background = background_of(function)
    scores = background.begin(3)

    def before(index: int) -> None:
        assert index != 1, "the generation went on"
        if index == 0:  # let the call of group 2, the first, come to its end
            assert next(iter(scores._calls.values())).exception(PATIENCE_S) is not None

    with pytest.raises(RewardError) as caught, scores:
        generate_rollout(Engine([2, 0, 1], before), whole.prompts, (1,), 2, on_group=scores.add)
    assert str(caught.value) == str(usual.value)


def test_the_result_fails_without_waiting_for_slower_calls() -> None:
    calls = Calls()
    calls.gate.clear()
    with pytest.raises(RewardError, match="reward broken, step 3: raised KeyError"):
        background_of(reward(calls, workers=1), reward(broken, workers=1)).begin(3).result(rollout())
    calls.gate.set()


def test_a_failed_call_that_may_fail_costs_the_scores_of_its_group_alone(caplog: pytest.LogCaptureFixture) -> None:
    def moody(prompts: list[str]) -> list[float]:
        return broken(prompts) if "p1" in prompts else [1.0] * len(prompts)

    with caplog.at_level(logging.WARNING):
        result = background_of(reward(moody, workers=2, on_error="none")).begin(1).result(rollout(3))
    np.testing.assert_array_equal(result[:, 0], [1, 1, np.nan, np.nan, 1, 1])
    assert len(caplog.records) == 1


@pytest.mark.parametrize("where", ["generation", "result"])
def test_calls_that_have_not_started_are_dropped_after_an_error(where: str) -> None:
    calls, whole = Calls(), rollout(3)
    calls.gate.clear()
    background = background_of(reward(calls, workers=1), reward(broken))

    def fail() -> None:
        with background.begin(1) as scores:
            for index in range(3):
                scores.add(index, whole.group(index))
            assert calls.began.acquire(timeout=PATIENCE_S)
            if where == "generation":
                raise RewardError
        scores.result(whole)

    with pytest.raises(RewardError):
        fail()
    calls.gate.set()
    with background.begin(2) as scores:
        scores.add(2, whole.group(2))
        assert calls.began.acquire(timeout=PATIENCE_S)
    assert calls.prompts == [["p0", "p0"], ["p2", "p2"]]


HANGING = """
import threading
from dataclasses import replace
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.reward.registry import reward_from_callable
from grpo_cli.reward.scorer import Scorer
from grpo_cli.rollout.background import BackgroundScorer
from tests.rollout.test_background import rollout

began = threading.Event()

def hang(prompts):
    began.set()
    threading.Event().wait()

scorer = Scorer([replace(reward_from_callable(hang), workers=2)])
with BackgroundScorer(scorer, Ranks()).begin(1) as scores:
    for index in range(4):
        scores.add(index, rollout().group(index))
    began.wait()
    raise SystemExit(3)
"""


def test_a_hanging_function_keeps_no_process_alive() -> None:
    assert subprocess.run([sys.executable, "-c", HANGING], timeout=120).returncode == 3
