"""Decoding steps that are recorded once and replayed: on a GPU, CUDA graphs.

A step of a small model is hundreds of kernels, and the host takes longer to start each than the GPU to run it.
A recorded step is started as a whole. It always reads and writes the same addresses, so sizes are rounded up and
each shape has a recording of its own, which is used only after its output has been compared with the step's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from grpo_cli.errors import one_line

EAGER_STEPS = 4
"""Steps of a shape that are computed directly before one is recorded, which takes as long as a few steps."""

TOLERANCE = 0.05
"""Largest difference between replay and step that rounding may cause, relative to the largest logit."""

Compute = Callable[[], torch.Tensor]
"""The (R, V) logits of a step, from tensors that stay where they are; called twice, it gives the same."""


class Recording(Protocol):
    """A step that was recorded."""

    def replay(self) -> None:
        """Compute it again, from what its tensors hold now, into the output that it was recorded with."""
        ...


Record = Callable[[Compute, torch.Tensor], Recording]
"""Records a step that writes its logits to the output."""


class DecodeGraphs:
    """The recorded steps of a rollout. If recording fails, all further steps are computed directly.

    Args:
        note: told why nothing is recorded any more.
        record: records a step; `CudaGraph` by default.
    """

    def __init__(self, note: Callable[[str], None], record: Record | None = None) -> None:
        self._note = note
        self._record = record
        self._is_off = False
        self.release()

    def release(self) -> None:
        """Let go of everything that was recorded: a rollout is over, and its keys and values with it."""
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, tuple[Recording, torch.Tensor]] = {}
        self._output = torch.empty(0, 0)
        self._pool: Any = None

    def run(self, shape: Hashable, compute: Compute) -> torch.Tensor | None:
        """The logits of a step of this shape, until the next step; None if the caller must compute them."""
        if self._is_off:
            return None
        if shape not in self._recordings:
            self._seen[shape] += 1
            if self._seen[shape] <= EAGER_STEPS or not self._recorded(shape, compute):
                return None
        recording, output = self._recordings[shape]
        recording.replay()
        return output

    def _recorded(self, shape: Hashable, compute: Compute) -> bool:
        """Record the step; return whether a replay gives the same logits."""
        try:
            expected = compute()
            if len(self._output) < len(expected):
                self._output = torch.empty_like(expected)
            output = self._output[: len(expected)]  # in one place for all shapes: logits are large
            recording = (self._record or self._cuda_graph)(compute, output)
            output.fill_(torch.nan)
            recording.replay()
            difference = _difference(output, expected)
        except RuntimeError as error:  # CUDA's refusals and a full device among them
            self._give_up(f"a step could not be recorded ({type(error).__name__}: {one_line(error, 300)})")
            return False
        if not difference <= TOLERANCE:
            self._give_up(f"a recorded step differs from itself by {difference:.2g} of the largest logit")
            return False
        self._recordings[shape] = recording, output
        return True

    def _cuda_graph(self, compute: Compute, output: torch.Tensor) -> Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(compute, output, self._pool)

    def _give_up(self, reason: str) -> None:
        self.release()
        self._is_off = True
        self._note(f"generation goes on without CUDA graphs: {reason}")


class CudaGraph:
    """A step as a CUDA graph.

    Args:
        compute: of kernels alone: nothing in it may wait for the device.
        output: takes its logits.
        pool: memory that all graphs of a rollout share, since no two run at the same time.
    """

    def __init__(self, compute: Compute, output: torch.Tensor, pool: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()  # libraries set up what they need for a stream, which cannot be recorded
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Reward functions may be using the device in threads of their own.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output.copy_(compute())

    def replay(self) -> None:
        """See `Recording.replay`."""
        self._graph.replay()


def bucketed(count: int, least: int, most: int) -> int:
    """The least of `least` (a power of two) times 1, 1.5, 2, 3, 4, 6, … that holds `count`, but `most` at most."""
    size = least
    while size < count:
        size += size // 3 if size % 3 == 0 else size // 2
    return min(size, most)


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest between two sets of logits, relative to the largest; some may be minus infinity in both."""
    apart = (actual - expected).abs().masked_fill_(actual == expected, 0)
    return (apart.max() / expected.masked_fill(expected.isinf(), 0).abs().max()).item()
