"""How often what failed is tried again."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

MAX_ATTEMPTS = 5
"""Attempts at a prompt or a set of weights. What fails so often is no passing fault."""

LONGEST_PAUSE_S = 5.0
"""Between two attempts."""


@dataclass
class Attempts:
    """Counts failures in a row.

    Args:
        timeout_s: how long a link may fail; where connections are refused, attempts alone would last a second.
    """

    timeout_s: float
    count: int = 0
    _began: float = field(default_factory=time.monotonic)

    def failed(self, *, is_link: bool) -> bool:
        """Count one; return whether to try again, which with a failing link is after a pause."""
        self.count += 1
        if self.count >= MAX_ATTEMPTS and not (is_link and time.monotonic() < self._began + self.timeout_s):
            return False
        if is_link:
            time.sleep(random.uniform(0.5, 1.0) * min(0.1 * 2 ** (self.count - 1), LONGEST_PAUSE_S))
        return True
