"""Scores groups with functions that have `workers` while other groups still generate.

Such a function is called once for each group, on threads of its own, so what it is called with does not depend on
timing. All others are called once with everything, on the calling thread, when it is generated. No torch import.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from grpo_cli.reward.hooks import NO_RUN, Logged, TrainerState
from grpo_cli.reward.scorer import Scored, Scorer
from grpo_cli.rollout.rollout import Rollout

if TYPE_CHECKING:
    from grpo_cli.distributed.ranks import Ranks

Jobs = SimpleQueue[tuple[Future[Scored], Callable[[], Scored]] | None]


class BackgroundScorer:
    """A run's scorer and the threads of its functions, which last over the steps.

    The threads are daemons, since Python cannot end one that hangs: they keep no process alive.

    Args:
        scorer: of the run.
        ranks: the processes that train together.
        plays_on_main: rank 0 has all environments. Otherwise each rank has those of the groups that it owns.
    """

    def __init__(self, scorer: Scorer, ranks: Ranks, *, plays_on_main: bool = False) -> None:
        self.scorer = scorer
        self.ranks = ranks
        self.shared = [
            k
            for k, function in enumerate(scorer.functions)
            if function.shares_work and not (plays_on_main and function.asks_for_environments)
        ]
        """Columns of the functions that each rank calls with the groups that it owns; rank 0 calls the others."""
        self.jobs: dict[int, Jobs] = {}
        """By column, what its function's workers wait for."""
        for k, function in enumerate(scorer.functions):
            if function.workers and k in self.shared:
                self.jobs[k] = jobs = Jobs()
                for _ in range(function.workers):
                    Thread(target=_work, args=(jobs,), daemon=True, name=f"reward {function.name}").start()
                    weakref.finalize(self, jobs.put, None)

    def begin(self, step: int, state: TrainerState = NO_RUN) -> RolloutScores:
        """Start on a rollout; `step` is for messages, `state` is what functions are told of the run."""
        return RolloutScores(self, step, state)


class RolloutScores:
    """The rewards of one rollout on their way. A context: an error in it drops the calls that have not started."""

    def __init__(self, background: BackgroundScorer, step: int, state: TrainerState) -> None:
        self.logged: list[Logged] = []
        """What functions have logged of this rollout's completions, all of it once there is a `result`."""
        self.count = 0
        """Completions of the rollout, once there is a `result`."""
        self._background = background
        self._step = step
        self._state = state
        self._added: set[int] = set()
        self._calls: dict[tuple[int, int], Future[Scored]] = {}  # (G, 1) by prompt and column

    def __enter__(self) -> RolloutScores:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            for call in self._calls.values():
                call.cancel()

    def add(self, index: int, group: Rollout) -> None:
        """Give the group of prompt `index` to the workers, if it is this rank's.

        Raises:
            RewardError: a reward function failed on an earlier group. With several ranks, `result` tells them all.
        """
        ranks = self._background.ranks
        if not ranks.owns(index) or group.is_lost(0):
            return
        if ranks.world_size == 1:
            self._raise_failures()
        self._added.add(index)
        batch = group.scoring_batch()
        for k, jobs in self._background.jobs.items():
            scorer = self._background.scorer.only([k])
            self._calls[index, k] = call = Future[Scored]()
            jobs.put((call, partial(scorer.score_and_log, batch, step=self._step, state=self._state)))

    def result(self, rollout: Rollout) -> np.ndarray:
        """Call the functions without workers, and wait for the others.

        What may be called with some groups only is called on each rank with the groups that it owns. All other
        functions are called once, with all completions, on rank 0.

        Args:
            rollout: all groups; those that were not added yet are added first.

        Returns:
            (N, K) float64, as from `Scorer.score`.

        Raises:
            RewardError: a reward function failed.
        """
        ranks, scorer, size = self._background.ranks, self._background.scorer, rollout.num_generations
        self.count = len(rollout.completions)
        there = [index for index in range(len(rollout.prompts)) if not rollout.is_lost(index)]
        own = [index for index in there if ranks.owns(index)]
        shared = self._background.shared
        at_once = [k for k in range(len(scorer.functions)) if k not in shared]
        scores = np.full((len(rollout.prompts), size, len(scorer.functions)), np.nan)
        if not there:
            return scores.reshape(len(rollout.completions), -1)
        whole = rollout if len(there) == len(rollout.prompts) else Rollout.joined(map(rollout.group, there))
        with self:
            for index in own:
                if index not in self._added:
                    self.add(index, rollout.group(index))
            if at_once:
                together = ranks.led(lambda: self._at_once(whole, at_once))
                scores[np.ix_(there, range(size), at_once)] = together.rewards.reshape(len(there), size, -1)
                self.logged += [call.at(places_of(there, size)) for call in together.logged]
            parts = ranks.together(lambda: self._own_scores(rollout, own)) if shared else []
            for rank, part in enumerate(parts):
                of_rank = [index for index in there if index % len(parts) == rank]
                scores[np.ix_(of_rank, range(size), shared)] = part.rewards.reshape(
                    len(of_rank), size, len(shared)
                )
                self.logged += [call.at(places_of(of_rank, size)) for call in part.logged]
        return scores.reshape(len(rollout.completions), -1)

    def _at_once(self, rollout: Rollout, columns: Sequence[int]) -> Scored:
        """What these functions say, which see everything."""
        self._raise_failures()
        scorer = self._background.scorer.only(columns)
        return scorer.score_and_log(rollout.scoring_batch(), step=self._step, state=self._state)

    def _own_scores(self, rollout: Rollout, own: Sequence[int]) -> Scored:
        """What the functions that share the work say to this rank's groups."""
        scorer, size, shared = self._background.scorer, rollout.num_generations, self._background.shared
        at_hand = [k for k in shared if not scorer.functions[k].workers]
        scores, logged = np.full((len(own), size, len(scorer.functions)), np.nan), []
        if own and at_hand:
            batch = Rollout.joined([rollout.group(index) for index in own]).scoring_batch()
            together = scorer.only(at_hand).score_and_log(batch, step=self._step, state=self._state)
            scores[:, :, at_hand] = together.rewards.reshape(len(own), size, -1)
            logged += together.logged
        wait(self._calls.values(), return_when=FIRST_EXCEPTION)
        self._raise_failures()
        places = {index: place for place, index in enumerate(own)}
        for (index, k), call in self._calls.items():
            of_group = call.result()
            scores[places[index], :, k] = of_group.rewards[:, 0]
            logged += [one.at(places_of([places[index]], size)) for one in of_group.logged]
        return Scored(scores[:, :, shared].reshape(len(own) * size, len(shared)), logged)

    def _raise_failures(self) -> None:
        for call in self._calls.values():
            if call.done():
                call.result()


def places_of(groups: Iterable[int], size: int) -> list[int]:
    """Where the completions of some groups of that size stand among all."""
    return [index * size + sample for index in groups for sample in range(size)]


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
