"""A step of TRL's GRPOTrainer against a step of ours: time, memory, and the share of what the machine can do.

Both train the same weights on the same prompts, and both are made to generate the same number of tokens. For each
shape two processes are alive, one for each system, and take a step in turns, so that whatever else the machine
does strikes both alike. Either runs its own training loop, untouched, between two pauses.

    python -m benchmarks.step_vs_trl [--device cuda] [--shapes 300x32,100x100] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks._machine import Machine, MachineProbe
from benchmarks._models import DEFAULT_MODEL, ModelSize, Shape, parse_shapes
from benchmarks._report import Bar, Report
from benchmarks._trainers import Spec
from benchmarks._workers import Message, Worker, WorkerError

MODULE = "benchmarks._trainers"
SYSTEMS = ("TRL", "ours")
DEFAULTS: dict[str, tuple[str, str, int]] = {
    "cpu": (DEFAULT_MODEL, "300x32,100x100,50x200", 4),
    "cuda": ("random-qwen2.5-0.5b,random-qwen2.5-1.5b", "1024x128", 8),
}
"""Models, shapes and prompts of a step on each device."""
STEP_BARS = {Shape(300, 32): 3.5, Shape(100, 100): 1.8, Shape(50, 200): 1.3}
"""How many times faster a step has to be (CPU)."""


@dataclass(frozen=True)
class Result:
    """Medians of a system's steps."""

    step: float
    generate: float
    train: float
    peak: float

    @classmethod
    def of(cls, steps: Sequence[Message]) -> Result:
        def median(key: str) -> float:
            return statistics.median(step[key] for step in steps)

        return cls(median("step"), median("generate"), median("train"), max(step["peak"] for step in steps))


def measure(
    options: argparse.Namespace, model: str, shape: Shape, probe: MachineProbe
) -> tuple[ModelSize, dict[str, Result]]:
    """Steps of both systems in turns, after one step each that is not counted."""
    steps: dict[str, list[Message]] = {system: [] for system in SYSTEMS}
    workers: dict[str, Worker] = {}
    try:
        for system in SYSTEMS:
            spec = Spec(
                system,
                model,
                options.device,
                shape.prompt,
                shape.completion,
                options.num_generations,
                options.prompts,
                options.repeats + 1,
                options.trl_batch,
            )
            workers[system] = Worker(MODULE, asdict(spec), options.threads)
        for repeat in range(options.repeats + 1):
            for system, worker in workers.items():
                answer = worker.ask()
                if repeat > 0:
                    steps[system].append(answer)
                    print(f"{shape} {system}: {answer['step']:.1f} s", file=sys.stderr)
            probe.measure()
    finally:
        for worker in workers.values():
            worker.close()
    return ModelSize(**workers["ours"].ready), {system: Result.of(steps[system]) for system in SYSTEMS}


COLUMNS = (
    "shape",
    "system",
    "step s",
    "generation s",
    "training s",
    "peak GB",
    "generated tokens/s",
    "training of floor",
    "generation of memory floor",
    "of arithmetic floor",
)


def rows_of(
    options: argparse.Namespace, machine: Machine, size: ModelSize, shape: Shape, results: dict[str, Result]
) -> list[list[str]]:
    """A row for each system and one of their ratios."""
    prompts, group_size = options.prompts, options.num_generations
    training = machine.training_floor(size, shape, prompts, group_size)
    decoding = machine.decoding_floor(size, shape)
    arithmetic = machine.generation_arithmetic(size, shape, prompts, group_size)
    rows = []
    for system, result in results.items():
        seconds = [f"{value:.2f}" for value in (result.step, result.generate, result.train)]
        shares = (training / result.train, decoding / result.generate, arithmetic / result.generate)
        rate = prompts * group_size * shape.completion / result.step
        rows.append(
            [str(shape), system, *seconds, f"{result.peak / 1e9:.2f}", f"{rate:.1f}"]
            + [f"{share:.0%}" for share in shares]
        )
    ratios = ratios_of(results)
    return [*rows, [str(shape), "ratio", *(f"{ratios[key]:.2f}×" for key in ratios), "", "", "", ""]]


def ratios_of(results: dict[str, Result]) -> dict[str, float]:
    """How many times faster ours is, and how its memory compares (below 1 is less)."""
    trl, ours = results["TRL"], results["ours"]
    return {
        "step": trl.step / ours.step,
        "generation": trl.generate / ours.generate,
        "training": trl.train / ours.train,
        "memory": ours.peak / trl.peak,
    }


def bars_of(
    options: argparse.Namespace, machine: Machine, size: ModelSize, shape: Shape, results: dict[str, Result]
) -> list[Bar]:
    """The bars of this shape on this device."""
    ratios = ratios_of(results)
    floor = machine.training_floor(size, shape, options.prompts, options.num_generations)
    share = floor / results["ours"].train
    if options.device == "cuda":
        if shape != Shape(1024, 128):
            return []
        return [
            Bar(f"{shape} training, times faster", ratios["training"], 2.5),
            Bar(f"{shape} training, share of peak bfloat16 FLOPs", share, 0.45),
            Bar(f"{shape} generation, times faster than generate", ratios["generation"], 4.0),
        ]
    bars = [Bar(f"{shape} training, share of the matmul floor", share, 0.55)]
    if shape in STEP_BARS:
        bars.insert(0, Bar(f"{shape} step, times faster", ratios["step"], STEP_BARS[shape]))
    if shape == Shape(300, 32):
        bars.append(Bar(f"{shape} peak memory against TRL's", ratios["memory"], 0.5, at_most=True))
    return bars


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a step of TRL's GRPOTrainer against a step of ours")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder or Hub id, or a random-… name; several with commas")
    parser.add_argument("--shapes", help="prompt and completion tokens: 300x32,100x100")
    parser.add_argument("--prompts", type=int, help="prompts of a step")
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--trl-batch", type=int, default=8, help="completions of a micro-batch of TRL")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each system")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="write the tables there, too")
    options = parser.parse_args()
    model, shapes, prompts = DEFAULTS[options.device]
    options.models = (options.model or model).split(",")
    options.shapes = parse_shapes(options.shapes or shapes)
    options.prompts = options.prompts or prompts
    if options.prompts * options.num_generations % options.trl_batch:
        parser.error("--trl-batch must divide prompts × generations")
    return options


def main() -> None:
    options = parse_options()
    report = Report()
    bars: list[Bar] = []
    probe = MachineProbe(options.device, options.threads)
    try:
        for model in options.models:
            measured = []
            for shape in options.shapes:
                try:
                    measured.append((shape, *measure(options, model, shape, probe)))
                except WorkerError as error:
                    report.lines(f"{model} {shape} failed: {error}")
                    bars.append(Bar(f"{model} {shape} ran", 0, 1))
            places = [(options, probe.machine, size, shape, results) for shape, size, results in measured]
            title = f"{model}: {options.prompts} prompts × {options.num_generations} completions a step, medians"
            report.table(title, COLUMNS, [row for place in places for row in rows_of(*place)])
            bars.extend(bar for place in places for bar in bars_of(*place))
        report.lines(probe.machine.line())
    finally:
        probe.close()
    report.lines(
        "Floors: training, 6 FLOPs for each weight and distinct token at the matmul rate (attention left out); "
        "generation, reading all weights once for each token of a completion at the memory rate, and 2 FLOPs for "
        "each weight and distinct token at the matmul rate."
    )
    report.lines(*map(str, bars))
    report.write(options.markdown)


if __name__ == "__main__":
    main()
