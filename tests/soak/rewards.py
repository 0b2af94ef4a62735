"""Rewards of the soak: whether a completion's checksum is odd, in each of the ways in which a function may run.

No policy learns to please them, so the work of a step stays the same. They agree, so some groups are flat and have
to be sampled again.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import Sequence
from itertools import count

CALLS_UNTIL_EXIT = 40
"""Calls after which the isolated function ends its process."""

_calls = count(1)


def plain(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: object) -> list[float]:
    return [float(zlib.crc32(text.encode("utf-8", "replace")) & 1) for text in completions]


def on_workers(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
    return plain(completions, completion_ids)


def within_time(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
    return plain(completions, completion_ids)


async def on_the_loop(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
    await asyncio.sleep(0)
    return plain(completions, completion_ids)


def apart(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """In a process of its own, which it ends now and then."""
    if next(_calls) > CALLS_UNTIL_EXIT:
        os._exit(3)
    return plain(completions, completion_ids)
