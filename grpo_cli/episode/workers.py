"""Threads on which tools and environments are called, so that generation waits for none of them.

Python cannot end a thread. One whose call takes too long is abandoned: another takes its place, and it
ends by itself if the call ever does.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

Call = Callable[[], Any]
"""What is called on a thread; where it gives an awaitable, that is awaited."""

WATCH_S = 0.05
"""Between two looks at which calls have taken too long."""


class CallTimeout(Exception):
    """A call took longer than it may."""


@dataclass
class Job:
    call: Call
    future: Future[Any]
    started: float = 0.0
    awaited: Future[Any] | None = None


@dataclass
class _Shared:
    """What threads know, so that they keep no `Workers` alive."""

    jobs: SimpleQueue[Job | None] = field(default_factory=SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: dict[int, Job] = field(default_factory=dict)
    """By thread."""
    loop: asyncio.AbstractEventLoop | None = None
    """What all that is awaited runs on, so that an object may keep a connection from one call to the next."""

    def wait_for(self, job: Job, awaitable: Awaitable[Any]) -> Any:
        """What it gives, awaited on the loop that all share."""

        async def result() -> Any:
            return await awaitable

        with self.lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                threading.Thread(target=self.loop.run_forever, daemon=True, name="episode loop").start()
        job.awaited = asyncio.run_coroutine_threadsafe(result(), self.loop)
        return job.awaited.result()


class Workers:
    """Calls functions, so many at a time.

    Args:
        count: of threads.
        timeout_s: of each call, from its start.
    """

    def __init__(self, count: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._shared = _Shared()
        self._count = count
        self._is_watched = False
        self._is_closed = threading.Event()
        weakref.finalize(self, _end, self._shared, count, self._is_closed)

    def submit(self, call: Call) -> Future[Any]:
        """The future of a call; it may fail with CallTimeout."""
        if not self._is_watched:
            self._is_watched = True
            for _ in range(self._count):
                self._start_thread()
            watcher = threading.Thread(
                target=_watch, args=(weakref.ref(self), self._is_closed), daemon=True, name="episode watch"
            )
            watcher.start()
        job = Job(call, Future())
        self._shared.jobs.put(job)
        return job.future

    def _start_thread(self) -> None:
        threading.Thread(target=_work, args=(self._shared,), daemon=True, name="episode").start()

    def end_late_calls(self) -> None:
        """Give up the calls that have taken too long."""
        now = time.monotonic()
        with self._shared.lock:
            late = {
                thread: job for thread, job in self._shared.running.items() if now - job.started > self._timeout_s
            }
            for thread in late:
                del self._shared.running[thread]
        for job in late.values():
            self._start_thread()
            if job.awaited is not None:
                job.awaited.cancel()
            job.future.set_exception(CallTimeout(f"no answer within {self._timeout_s:g} s"))


def _work(shared: _Shared) -> None:
    """Do one job after the other, until None comes or a job was taken from this thread."""
    thread = threading.get_ident()
    while (job := shared.jobs.get()) is not None:
        job.started = time.monotonic()
        with shared.lock:
            shared.running[thread] = job
        result, error = None, None
        try:
            result = job.call()
            if inspect.isawaitable(result):
                result = shared.wait_for(job, result)
        except BaseException as raised:  # it is raised where the result is asked for
            error = raised
        with shared.lock:
            if shared.running.get(thread) is not job:
                return  # it was given up, and another thread is in this one's place
            del shared.running[thread]
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)
        del job, result, error


def _watch(workers: weakref.ref[Workers], is_closed: threading.Event) -> None:
    while not is_closed.wait(WATCH_S):
        owner = workers()
        if owner is None:
            return
        owner.end_late_calls()
        del owner


def _end(shared: _Shared, count: int, is_closed: threading.Event) -> None:
    is_closed.set()
    for _ in range(count):
        shared.jobs.put(None)
    if shared.loop is not None:
        shared.loop.call_soon_threadsafe(shared.loop.stop)
