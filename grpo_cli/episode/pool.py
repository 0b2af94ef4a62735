"""The environments of a run, made once for each episode that runs at the same time and reset between episodes.

Making one may mean starting a process or opening a connection. No torch import.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from grpo_cli.episode.environments import COLUMN, EnvironmentKind, close_environment
from grpo_cli.errors import RunError, UserError
from grpo_cli.plugins import origin

logger = logging.getLogger("grpo_cli")

CLOSE_S = 10.0
"""How long the end of a run waits for environments to close."""


class EnvironmentPool:
    """The environments of a run. Threads may share it.

    Who takes an object has it alone until it gives it back. As many are made as are out at the same time.
    """

    def __init__(self, kinds: Mapping[str | None, EnvironmentKind]) -> None:
        self._kinds = kinds
        self._lock = threading.Lock()
        self._idle: dict[str | None, list[Any]] = {name: [] for name in kinds}

    def kind(self, name: str | None) -> EnvironmentKind:
        """The environment that a row asks for.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self._kinds:
            known = ", ".join(str(known) for known in self._kinds)
            raise UserError(f"a row's column {COLUMN} is {name!r}, and episode.environment has {known}")
        return self._kinds[name]

    def take(self, name: str | None) -> Any:
        """An object that nobody has, made if there is none. It was used before: `reset` comes first.

        Raises:
            UserError: there is no environment of this name.
            RunError: it cannot be made.
        """
        kind = self.kind(name)
        with self._lock:
            if self._idle[name]:
                return self._idle[name].pop()
        try:
            return kind.make()
        except Exception as error:
            raise RunError(f"environment {kind.class_name} cannot be made: {origin(error)}") from error

    def give_back(self, name: str | None, instance: Any) -> None:
        """Let others have it. What scores its episode must have done so: the next one resets it."""
        with self._lock:
            self._idle[name].append(instance)

    def discard(self, name: str | None, instance: Any, *, hangs: bool = False) -> None:
        """Close it in place of giving it back, on a thread of its own.

        Args:
            name: of the environment.
            instance: the object.
            hangs: a call that was given up is still at work in it. It is then left alone: hardly any class expects
                a call of `close` from another thread meanwhile.
        """
        if not hangs:
            self._start_closing(self._kinds[name], instance)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Close all that nobody has, at the same time; those that fail, or take longer, are warned of."""
        with self._lock:
            idle = [(self._kinds[name], instance) for name, list_ in self._idle.items() for instance in list_]
            self._idle = {name: [] for name in self._kinds}
        threads = [self._start_closing(kind, instance) for kind, instance in idle]
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = sum(thread.is_alive() for thread in threads)
        if late:
            logger.warning("%d environments did not close within %g seconds", late, timeout_s)

    def _start_closing(self, kind: EnvironmentKind, instance: Any) -> threading.Thread:
        def work() -> None:
            try:
                close_environment(instance)
            except Exception as error:
                logger.warning("environment %s: close failed: %s", kind.class_name, origin(error))

        thread = threading.Thread(target=work, daemon=True, name=f"close {kind.class_name}")
        thread.start()
        return thread
