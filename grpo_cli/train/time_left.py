"""How long a run still takes, in few characters. No torch, no I/O."""

from __future__ import annotations

from collections import deque

SPEED_STEPS = 30
"""Steps over whose mean duration the time left is estimated: evaluations and checkpoints are among them."""


def duration(seconds: float) -> str:
    """Seconds in the one or two units that a reader cares about: `45 s`, `4 min`, `1 h 20 min`, `2 d 3 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


class TimeLeft:
    """Estimates when a run will have ended, from the moments at which its last steps ended.

    Only steps of this process count: after a resume the first estimate is the duration of one step.

    Args:
        max_steps: the last step of the run.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self._step = 0
        self._ends: deque[float] = deque(maxlen=SPEED_STEPS + 1)
        self._seconds_per_step = 0.0

    def step_ended(self, step: int, now: float, seconds: float) -> None:
        """Take note of a step.

        Args:
            step: its number, from 1.
            now: seconds of any clock that does not stand still.
            seconds: what the step itself took. What is between two steps counts too, from the second on.
        """
        self._step = step
        self._ends.append(now)
        steps = len(self._ends) - 1
        self._seconds_per_step = (now - self._ends[0]) / steps if steps else seconds

    def seconds(self, now: float) -> float | None:
        """Seconds that are left; None before the first step. They fall until the step that runs is overdue."""
        if not self._ends:
            return None
        of_step = max(0.0, self._seconds_per_step - (now - self._ends[-1]))
        steps = self.max_steps - self._step
        return (steps - 1) * self._seconds_per_step + of_step if steps > 0 else 0.0
