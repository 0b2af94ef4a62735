"""What the machine can do: float arithmetic and reading memory, measured in a process of its own."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks._models import ModelSize, Shape
from benchmarks._workers import Channel, Message, Worker


@dataclass(frozen=True)
class Machine:
    """The median rates of this run."""

    name: str
    cores: int
    threads: int
    torch: str
    dtype: str
    """Of the matrix product."""
    flops: float
    """Per second, of a matrix product."""
    read_bytes: float
    """Per second, of the sum of a large tensor."""

    def line(self) -> str:
        return (
            f"{self.name}, {self.cores} cores, {self.threads} threads, torch {self.torch}; {self.dtype} matmul "
            f"{self.flops / 1e9:,.0f} GFLOP/s, memory read {self.read_bytes / 1e9:,.1f} GB/s "
            "(sum of a large tensor)"
        )

    def training_floor(self, size: ModelSize, shape: Shape, prompts: int, group_size: int) -> float:
        """Seconds of matrix products that training on a step's distinct tokens cannot do without.

        Forward and backward are 6 FLOPs for each weight and token: all weights but the output head on each prompt
        once and each completion, the output head on completions only. Attention is left out.
        """
        completion = prompts * group_size * shape.completion
        distinct = prompts * shape.prompt + completion
        return 6 * (size.body * distinct + size.head * completion) / self.flops

    def decoding_floor(self, size: ModelSize, shape: Shape) -> float:
        """Seconds in which every weight can be read once for each token of a completion."""
        bytes_of_weight = 2 if self.dtype == "bfloat16" else 4
        return bytes_of_weight * (size.body + size.head) * shape.completion / self.read_bytes

    def generation_arithmetic(self, size: ModelSize, shape: Shape, prompts: int, group_size: int) -> float:
        """Seconds of matrix products of a rollout: each prompt once, each completion; attention left out.

        With many rows it is this, and not the memory, that bounds decoding.
        """
        completion = prompts * group_size * shape.completion
        distinct = prompts * shape.prompt + completion
        return 2 * (size.body * distinct + size.head * completion) / self.flops


class MachineProbe:
    """Measures between the steps of a run; the median counts, as it does for the steps."""

    def __init__(self, device: str, threads: int) -> None:
        self._worker = Worker("benchmarks._machine", {"device": device}, threads)
        self._threads = threads
        self._answers: list[Message] = []
        self.measure()

    def measure(self) -> None:
        self._answers.append(self._worker.ask())

    @property
    def machine(self) -> Machine:
        about = self._worker.ready
        return Machine(
            about["name"],
            about["cores"],
            self._threads,
            about["torch"],
            about["dtype"],
            statistics.median(answer["flops"] for answer in self._answers),
            statistics.median(answer["read_bytes"] for answer in self._answers),
        )

    def close(self) -> None:
        self._worker.close()


def device_name(device: str) -> str:
    """Of the card or the processor."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def rates(device: str, tries: int = 12) -> Message:
    """The median of several tries at a matrix product and at reading a tensor that no cache can hold."""
    import torch

    on_cuda = device == "cuda"
    side = 8192 if on_cuda else 2048
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_cuda else torch.float32)
    large = torch.ones((1024 if on_cuda else 256) * 2**20, device=device)

    def typical(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(tries):
            start = time.perf_counter()
            work()
            if on_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    with torch.inference_mode():
        flops = 2 * side**3 / typical(lambda: matrix @ matrix)
        read_bytes = large.numel() * large.element_size() / typical(large.sum)
    return {"flops": flops, "read_bytes": read_bytes}


def _serve() -> None:
    import torch

    channel = Channel()
    device = channel.receive()["device"]
    dtype = "bfloat16" if device == "cuda" else "float32"
    channel.send(name=device_name(device), cores=os.cpu_count(), torch=torch.__version__, dtype=dtype)
    while True:
        channel.receive()
        channel.send(**rates(device))


if __name__ == "__main__":
    _serve()
