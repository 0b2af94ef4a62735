"""Scores groups with functions that have `workers` while other groups still generate.

Such a function is called once for each group, on threads of its own, so what it is called with does not depend on
timing. All others are called once with everything, on the calling thread, when it is generated. No torch import.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from queue import SimpleQueue
from threading import Thread

import numpy as np

from grpo_cli.reward.scorer import Scorer
from grpo_cli.rollout.rollout import Rollout

Jobs = SimpleQueue[tuple[Future[np.ndarray], Callable[[], np.ndarray]] | None]


class BackgroundScorer:
    """A run's scorer and the threads of its functions, which last over the steps.

    The threads are daemons, since Python cannot end one that hangs: they keep no process alive.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.jobs: dict[int, Jobs] = {}
        """By column, what its function's workers wait for."""
        for k, function in enumerate(scorer.functions):
            if function.workers:
                self.jobs[k] = jobs = Jobs()
                for _ in range(function.workers):
                    Thread(target=_work, args=(jobs,), daemon=True, name=f"reward {function.name}").start()
                    weakref.finalize(self, jobs.put, None)

    def begin(self, step: int) -> RolloutScores:
        """Start on a rollout; `step` is for messages."""
        return RolloutScores(self, step)


class RolloutScores:
    """The rewards of one rollout on their way. A context: an error in it drops the calls that have not started."""

    def __init__(self, background: BackgroundScorer, step: int) -> None:
        self._background = background
        self._step = step
        self._added: set[int] = set()
        self._calls: dict[tuple[int, int], Future[np.ndarray]] = {}  # (G, 1) by prompt and column

    def __enter__(self) -> RolloutScores:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            for call in self._calls.values():
                call.cancel()

    def add(self, index: int, group: Rollout) -> None:
        """Give the group of prompt `index` to the workers.

        Raises:
            RewardError: a reward function failed on an earlier group.
        """
        self._raise_failures()
        self._added.add(index)
        batch = group.scoring_batch()
        for k, jobs in self._background.jobs.items():
            scorer = self._background.scorer.only([k])
            self._calls[index, k] = call = Future[np.ndarray]()
            jobs.put((call, partial(scorer.score, batch, step=self._step)))

    def result(self, rollout: Rollout) -> np.ndarray:
        """Call the functions without workers, and wait for the others.

        Args:
            rollout: all groups; those that were not added yet are added first.

        Returns:
            (N, K) float64, as from `Scorer.score`.

        Raises:
            RewardError: a reward function failed.
        """
        scorer, size = self._background.scorer, rollout.num_generations
        at_once = [k for k, function in enumerate(scorer.functions) if not function.workers]
        scores = np.full((len(rollout.completions), len(scorer.functions)), np.nan)
        with self:
            for index in range(len(rollout.prompts)):
                if index not in self._added:
                    self.add(index, rollout.group(index))
            self._raise_failures()
            scores[:, at_once] = scorer.only(at_once).score(rollout.scoring_batch(), step=self._step)
            wait(self._calls.values(), return_when=FIRST_EXCEPTION)
            self._raise_failures()
        for (index, k), call in self._calls.items():
            scores[size * index : size * (index + 1), k] = call.result()[:, 0]
        return scores

    def _raise_failures(self) -> None:
        for call in self._calls.values():
            if call.done():
                call.result()


def _work(jobs: Jobs) -> None:
    """Do one job after the other until None comes."""
    while (job := jobs.get()) is not None:
        future, call = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # it is raised where the result is asked for
                future.set_exception(error)
        del job, future, call  # they hold a rollout, and the next may be long in coming
