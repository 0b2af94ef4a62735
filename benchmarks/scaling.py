"""What training costs as groups grow and as prompts grow: the shared prompt against a row for each completion.

One prompt's group of random tokens goes forward and backward, as the training loop does it. With the prompt shared
the cost should grow with the distinct tokens, P + G·T, and without with the rows' tokens, G·(P + T). Each
measurement has a process of its own, so that its peak memory is its own.

    python -m benchmarks.scaling [--device cuda] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._machine import MachineProbe
from benchmarks._models import DEFAULT_MODEL, ModelSize, load
from benchmarks._report import Report
from benchmarks._workers import WORKER_FLAG, Channel, Message, Worker, WorkerError, peak_memory

MODULE = "benchmarks.scaling"
DEFAULT_MODELS = {"cpu": DEFAULT_MODEL, "cuda": "random-qwen2.5-0.5b"}
LAYOUTS = {True: "shared", False: "rows"}


@dataclass(frozen=True)
class Spec:
    """One measurement."""

    model: str
    device: str
    prompt: int
    completion: int
    group_size: int
    shared_prompt: bool
    token_budget: int | None
    """Tokens of a forward pass; the product's own for the device if empty."""

    @property
    def distinct_tokens(self) -> int:
        return self.prompt + self.group_size * self.completion

    @property
    def row_tokens(self) -> int:
        return self.group_size * (self.prompt + self.completion)


def forward_backward(packed: Any, packs: Sequence[Any], autocast: Any) -> None:
    """What the training loop does with packs, under the plainest of losses."""
    for pack in packs:
        with autocast():
            logprobs, _ = packed.token_logprobs(pack, 1.0)
        (-logprobs.mean()).backward()


def serve() -> None:
    """Be the worker that the first message asks for."""
    import torch

    from grpo_cli.algorithm.packing import Group, pack_groups
    from grpo_cli.policy.logprobs import PackedModel
    from grpo_cli.recipe.limits import automatic_microbatch_tokens
    from grpo_cli.recipe.schema import ModelConfig
    from grpo_cli.train.guards import autocast_for, deterministic_kernels

    channel = Channel()
    spec = Spec(**channel.receive())
    device = torch.device(spec.device)
    model, _ = load(spec.model)
    model.to(device)
    packed = PackedModel.checked(model)
    autocast = autocast_for(ModelConfig(name=spec.model), device)
    source = torch.Generator().manual_seed(0)

    def packs(prompt: int, completion: int) -> list[Any]:
        tokens = torch.randint(model.config.vocab_size, (prompt + spec.group_size * completion,), generator=source)
        completions = tokens[prompt:].view(spec.group_size, completion).tolist()
        group = Group(tokens[:prompt].tolist(), completions, range(spec.group_size))
        budget = spec.token_budget or automatic_microbatch_tokens(spec.device, spec.prompt)
        parts = pack_groups([group], budget, shared_prompt=spec.shared_prompt)
        return [part.to(device) for part in parts]

    measured = packs(spec.prompt, spec.completion)
    with deterministic_kernels():
        # Warm-up: a few tokens, but on a GPU, which compiles for lengths, all of them.
        forward_backward(packed, measured if spec.device == "cuda" else packs(8, 8), autocast)
        channel.send(computed=sum(pack.input_ids.numel() for pack in measured), **asdict(ModelSize.of(model)))
        while True:
            channel.receive()
            model.zero_grad()
            start = time.perf_counter()
            forward_backward(packed, measured, autocast)
            if spec.device == "cuda":
                torch.cuda.synchronize()
            channel.send(seconds=time.perf_counter() - start, peak=peak_memory(spec.device))


@dataclass(frozen=True)
class Result:
    spec: Spec
    seconds: float
    peak: float
    computed: int
    """Tokens that the forward passes had as input."""

    @property
    def row(self) -> list[str]:
        spec = self.spec
        return [
            LAYOUTS[spec.shared_prompt],
            f"G {spec.group_size}, P {spec.prompt}, T {spec.completion}",
            str(spec.distinct_tokens),
            str(spec.row_tokens),
            str(self.computed),
            f"{self.seconds:.2f}",
            f"{1000 * self.seconds / spec.distinct_tokens:.2f}",
            f"{spec.distinct_tokens / self.seconds:.1f}",
            f"{self.peak / 1e9:.2f}",
        ]


COLUMNS = (
    "layout",
    "group",
    "distinct tokens",
    "rows' tokens",
    "computed",
    "seconds",
    "ms per distinct token",
    "distinct tokens/s",
    "peak GB",
)


def measure(spec: Spec, repeats: int, threads: int) -> Result:
    """The median of some repetitions in a process of their own.

    Raises:
        WorkerError: it ended, out of memory perhaps.
    """
    with Worker(MODULE, asdict(spec), threads) as worker:
        answers: list[Message] = [worker.ask() for _ in range(repeats)]
    seconds = statistics.median(answer["seconds"] for answer in answers)
    peak = max(answer["peak"] for answer in answers)
    return Result(spec, seconds, peak, worker.ready["computed"])


def growth(name: str, results: Sequence[Result]) -> str:
    """How much more the last measurement of a sweep costs than the first, beside what both laws say."""
    first, last = results[0], results[-1]
    seconds = last.seconds / first.seconds
    distinct = last.spec.distinct_tokens / first.spec.distinct_tokens
    rows = last.spec.row_tokens / first.spec.row_tokens
    return (
        f"{name}, {LAYOUTS[first.spec.shared_prompt]}: {seconds:.1f}× the seconds of the first; "
        f"P + G·T grew {distinct:.1f}×, G·(P + T) {rows:.1f}×"
    )


def parse_options() -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description="the cost of training as groups and prompts grow")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder or Hub id, or a random-… name")
    parser.add_argument("--group-sizes", type=integers, default=[4, 8, 16, 32], help="swept")
    parser.add_argument("--prompt", type=int, default=512, help="while group sizes are swept")
    parser.add_argument(
        "--prompts", type=integers, default=[64, 256, 1024, 2048], help="swept at --num-generations"
    )
    parser.add_argument("--num-generations", type=int, default=8, help="while prompts are swept")
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--token-budget", type=int, help="of a forward pass; the product's own if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="write the tables there, too")
    options = parser.parse_args()
    options.model = options.model or DEFAULT_MODELS[options.device]
    return options


def main() -> None:
    options = parse_options()
    sweeps = {
        "groups grow": [(options.prompt, size) for size in options.group_sizes],
        "prompts grow": [(prompt, options.num_generations) for prompt in options.prompts],
    }
    report = Report()
    probe = MachineProbe(options.device, options.threads)
    laws: list[str] = []
    try:
        for name, points in sweeps.items():
            results: dict[bool, list[Result]] = {shared: [] for shared in LAYOUTS}
            for prompt, group_size in points:
                for shared in LAYOUTS:
                    spec = Spec(
                        options.model,
                        options.device,
                        prompt,
                        options.completion,
                        group_size,
                        shared,
                        options.token_budget,
                    )
                    try:
                        result = measure(spec, options.repeats, options.threads)
                    except WorkerError as error:
                        report.lines(f"{LAYOUTS[shared]} G {group_size} P {prompt} failed: {error}")
                        continue
                    print(*result.row, file=sys.stderr)
                    results[shared].append(result)
            probe.measure()
            report.table(name, COLUMNS, [result.row for part in results.values() for result in part])
            laws.extend(growth(name, part) for part in results.values() if part)
        report.lines(*laws)
        report.lines(probe.machine.line())
    finally:
        probe.close()
    report.write(options.markdown)


if __name__ == "__main__":
    serve() if WORKER_FLAG in sys.argv else main()
