"""Calls every reward function on completions of a step and returns one checked matrix.

Reward functions are other people's code: they hang, raise, miscount and change what they were given. Whatever
they do becomes a column of numbers, or an error that names the function, the step and a sample. They must never
change the training data, and a failure must never become a score. No torch import, since `grpo check` scores too.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import math
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from grpo_cli.errors import RunError, StoppedEarly, UserError
from grpo_cli.reward.hooks import NO_RUN, CallLog, Logged, TrainerState
from grpo_cli.reward.isolated import IsolatedFailure, IsolatedFunction, IsolatedTimeout
from grpo_cli.reward.registry import ENVIRONMENTS, RewardFunction, is_async
from grpo_cli.reward.values import Unusable, checked_values, shortened

logger = logging.getLogger("grpo_cli")

PACKAGE = Path(__file__).parents[1]

PASSED_ON = (KeyboardInterrupt, StoppedEarly)
"""Exceptions that end the run wherever they are raised, and are no failure of the function that was running."""

GRACE_S = 1.0
"""How late the event loop may be in ending a call before it counts as blocked."""


class RewardError(RunError):
    """A reward function failed, or returned something that is not one number or None per completion."""


@dataclass(frozen=True)
class ScoringBatch:
    """What the functions are called with; every list has one entry per completion."""

    prompts: list[Any]
    """Strings or lists of messages."""
    completions: list[Any]
    """Strings or lists of messages."""
    completion_ids: list[list[int]]
    """Token ids of each completion."""
    columns: dict[str, list[Any]]
    """The dataset's other columns."""
    environments: list[Any] | None = None
    """The object of each completion's episode as it was left, where episodes have environments."""

    def __post_init__(self) -> None:
        lists = {"prompts": self.prompts, "completion_ids": self.completion_ids, **self.columns}
        if self.environments is not None:
            lists[ENVIRONMENTS] = self.environments
        for name, values in lists.items():
            if len(values) != len(self.completions):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.completions)} completions")


@dataclass(frozen=True)
class Scored:
    """What K functions say to N completions."""

    rewards: np.ndarray
    """(N, K) float64: a row per completion, a column per function, NaN where it returned None."""
    logged: list[Logged]
    """By the calls that succeeded."""


class Scorer:
    """The reward functions of a run, called together on some or all groups of a step.

    Plain functions run in order on the calling thread. At the same time those with a timeout run on threads of
    their own, and `async` ones on an event loop. The loop is kept, so that a client made in one step works in the
    next. A plain function that overruns its timeout is left running, since Python cannot end a thread; that of an
    isolated one is ended with its process.
    """

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        """Take the functions in the order of the matrix's columns.

        Raises:
            UserError: two functions have the same name, so their metrics would be mixed.
        """
        self.functions = list(functions)
        self.names = [function.name for function in self.functions]
        self.weights = [function.weight for function in self.functions]
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise UserError(f"rewards: more than one is named {', '.join(repeated)}; give each its own name")
        self._loop = _LoopThread()
        weakref.finalize(self, self._loop.leave)

    def only(self, columns: Sequence[int]) -> Scorer:
        """A scorer of some of the functions. It shares this one's event loop, which their clients belong to.

        Threads may call `score` of this scorer and of those made from it at the same time.
        """
        part = copy.copy(self)
        part.functions = [self.functions[k] for k in columns]
        part.names = [self.names[k] for k in columns]
        part.weights = [self.weights[k] for k in columns]
        return part

    def score(self, batch: ScoringBatch, *, step: int, state: TrainerState = NO_RUN) -> np.ndarray:
        """The rewards of `score_and_log`, (N, K)."""
        return self.score_and_log(batch, step=step, state=state).rewards

    def score_and_log(self, batch: ScoringBatch, *, step: int, state: TrainerState = NO_RUN) -> Scored:
        """Call every function once on all completions.

        Args:
            batch: prompts, completions and columns; never changed by a reward function.
            step: for messages.
            state: what functions are told of the run.

        Raises:
            RewardError: a function with `on_error: raise` failed, timed out, or returned something unusable.
        """
        count = len(batch.completions)
        scores, logged = np.full((count, len(self.functions)), np.nan), []
        if not count:
            return Scored(scores, [])
        logs = [CallLog(count) for _ in self.functions]
        prepare = [
            partial(_prepared, one, batch, state, log) for one, log in zip(self.functions, logs, strict=True)
        ]
        calls: dict[int, _Call] = {}  # by column: those that run beside this thread
        blocked = False  # whether a call keeps the event loop from ending another in time

        def take(k: int, outcome: _Outcome) -> None:
            scores[:, k] = _column(self.functions[k], outcome, batch, step)
            if outcome.succeeded:
                logged.append(logs[k].taken(self.names[k]))

        try:
            for k, function in enumerate(self.functions):
                if is_async(function.call) or function.timeout_s is not None:
                    calls[k] = self._start_aside(function, prepare[k](), count)
            for k in range(len(self.functions)):
                if k not in calls:
                    ended = self._call_here(prepare[k], count)
                    if isinstance(ended, _Outcome):
                        take(k, ended)
                    else:
                        calls[k] = ended
            for k, call in calls.items():
                outcome = call.outcome()
                blocked |= call.on_loop and not call.future.done()
                take(k, outcome)
        finally:
            for call in calls.values():
                call.future.cancel()
            if blocked:
                self._loop.leave()
        return Scored(scores, logged)

    def _start_aside(self, function: RewardFunction, start: Callable[[], Any], count: int) -> _Call:
        """Start a function on the event loop or on a thread of its own, and do not wait."""
        timeout_s = function.timeout_s
        if is_async(function.call):
            coroutine = _await_outcome(start, count, timeout_s)
            deadline = None if timeout_s is None else time.monotonic() + timeout_s + GRACE_S
            return _Call(self._loop.submit(coroutine), deadline, on_loop=True)
        future: Future[_Outcome] = Future()
        loop = self._loop
        # It keeps its own time, which begins when its process is there.
        waits = not isinstance(function.call, IsolatedFunction)

        def work() -> None:
            future.set_running_or_notify_cancel()  # from here on cancel() does nothing
            future.set_result(
                _outcome_in_thread(start, count, timeout_s if waits and timeout_s else math.inf, loop)
            )

        threading.Thread(target=work, daemon=True, name=f"reward {function.name}").start()
        return _Call(future, time.monotonic() + timeout_s if waits and timeout_s else None)

    def _call_here(self, prepare: Callable[[], Callable[[], Any]], count: int) -> _Outcome | _Call:
        """Call a function on this thread; if it returns an awaitable, that goes to the event loop."""
        try:
            result = prepare()()
            if inspect.isawaitable(result):
                coroutine = _await_outcome(lambda: result, count, None)
                return _Call(self._loop.submit(coroutine), None, on_loop=True)
            return _Outcome(checked_values(result, count))
        except BaseException as error:  # SystemExit too: a completion that is run may call exit()
            return _Outcome(error=error)


@dataclass(frozen=True)
class _Outcome:
    """How one call ended."""

    values: list[float] | None = None
    error: BaseException | None = None
    timed_out: bool = False

    @property
    def succeeded(self) -> bool:
        return self.values is not None and not self.timed_out


@dataclass(frozen=True)
class _Call:
    """A call that was started."""

    future: Future[_Outcome]
    deadline: float | None
    """When to stop waiting, on the monotonic clock."""
    on_loop: bool = False

    def outcome(self) -> _Outcome:
        """Wait for the end of the call, or for its deadline."""
        wait_s = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            return self.future.result(wait_s)
        except TimeoutError:
            return _Outcome(timed_out=True)
        except CancelledError as error:  # the function cancelled the task that it ran in
            return _Outcome(error=error)


class _LoopThread:
    """An event loop on a daemon thread, started when first needed; the caller may have a loop of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: weakref.WeakSet[Future[_Outcome]] = weakref.WeakSet()

    def submit(self, coroutine: Coroutine[Any, Any, _Outcome]) -> Future[_Outcome]:
        with self._lock:
            if self._loop is None:
                self._loop, self._calls = asyncio.new_event_loop(), weakref.WeakSet()
                arguments = (self._loop, self._calls)
                threading.Thread(target=_serve, args=arguments, daemon=True, name="reward event loop").start()
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(future)
            return future

    def leave(self) -> None:
        """Let the loop end when the calls on it have; the next submit starts another one."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(loop.stop)


def _serve(loop: asyncio.AbstractEventLoop, calls: weakref.WeakSet[Future[_Outcome]]) -> None:
    """Run a loop until it was stopped and the last call on it has ended; then cancel what is left on it."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(_ended(calls))
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()


async def _ended(calls: Iterable[Future[_Outcome]]) -> None:
    """Wait until every call has ended or was given up."""
    await asyncio.gather(*map(asyncio.wrap_future, calls), return_exceptions=True)


async def _await_outcome(start: Callable[[], Any], count: int, timeout_s: float | None) -> _Outcome:
    """Run a call to its end on the event loop. Raises nothing: an exception would end the loop's thread."""
    began = time.monotonic()
    scope = asyncio.timeout(timeout_s)
    try:
        async with scope:
            result = start()
            if inspect.isawaitable(result):
                result = await result
            values = checked_values(result, count)
    except BaseException as error:
        return _Outcome(error=error, timed_out=scope.expired())
    return _Outcome(values, timed_out=scope.expired() or time.monotonic() - began > (timeout_s or math.inf))


def _outcome_in_thread(start: Callable[[], Any], count: int, timeout_s: float, loop: _LoopThread) -> _Outcome:
    """Run a call to its end on this thread. Raises nothing: nobody would see it."""
    began = time.monotonic()
    try:
        result = start()
        if inspect.isawaitable(result):
            left_s = max(0.0, began + timeout_s - time.monotonic())
            return loop.submit(_await_outcome(lambda: result, count, left_s)).result()
        values = checked_values(result, count)
    except BaseException as error:
        return _Outcome(error=error, timed_out=isinstance(error, IsolatedTimeout))
    return _Outcome(values, timed_out=time.monotonic() - began > timeout_s)


def _prepared(
    function: RewardFunction, batch: ScoringBatch, state: TrainerState, log: CallLog
) -> Callable[[], Any]:
    """The call with the arguments that the function accepts, each a copy of its own."""
    offered: dict[str, Any] = {
        **batch.columns,
        "prompts": batch.prompts,
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
        "trainer_state": state,
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }
    arguments = {
        name: [list(ids) for ids in values] if name == "completion_ids" else _copied(values)
        for name, values in offered.items()
        if function.accepts is None or name in function.accepts
    }
    if batch.environments is not None and function.asks_for_environments:
        arguments[ENVIRONMENTS] = list(batch.environments)  # themselves: there is one of each
    return lambda: function.call(**arguments)


def _copied(value: Any) -> Any:
    """Lists and dicts copied all the way down, so that changing a message changes nobody else's."""
    if type(value) is list:
        return [_copied(item) for item in value]
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value


def _column(function: RewardFunction, outcome: _Outcome, batch: ScoringBatch, step: int) -> list[float]:
    """The function's column. A failed call is a RewardError, or all NaN with a warning, as `on_error` says."""
    error = outcome.error
    if isinstance(error, PASSED_ON):
        raise error
    if outcome.succeeded and outcome.values is not None:
        return outcome.values
    index = 0
    if outcome.timed_out:
        what = f"took longer than {function.timeout_s:g} seconds (timeout_s)"
    elif isinstance(error, Unusable):
        what, index = str(error), error.index
    elif isinstance(error, IsolatedFailure):
        what = str(error)
    else:
        what = f"raised {described(error)}"
    message = (
        f"reward {function.name}, step {step}: {what}\n"
        f"  prompt {index}: {shortened(batch.prompts[index])}\n"
        f"  completion {index}: {shortened(batch.completions[index])}"
    )
    if function.on_error == "raise":
        raise RewardError(message) from error
    logger.warning(message)
    return [math.nan] * len(batch.completions)


def described(error: BaseException | None) -> str:
    """`Type: message at file:line`, where the line is the last one outside this package."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    outside = [frame for frame in frames if not Path(frame.filename).is_relative_to(PACKAGE)]
    return f"{text} at {outside[-1].filename}:{outside[-1].lineno}" if outside else text
