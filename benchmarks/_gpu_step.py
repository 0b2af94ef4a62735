"""The step part of `benchmarks.gpu`: `benchmarks.step_vs_trl`, a process of TRL's and one of ours in turns."""

from __future__ import annotations

import argparse

from benchmarks import step_vs_trl
from benchmarks._gpu_results import Finding, Part
from benchmarks._machine import MachineProbe
from benchmarks._models import Shape
from benchmarks._report import Bar

TRAINING_BAR, GENERATION_BAR = 2.5, 4.0
THREADS = 4
LONG_COMPLETION = 512
"""Longer ones, of which TRL takes half a minute a step, are measured once less."""
PIECES = {
    f"{model}-{shape.prompt}x{shape.completion}-g{size}": (f"random-{model}", shape, size)
    for shape in (Shape(1024, 128), Shape(256, 1024))
    for model in ("qwen2.5-0.5b", "qwen2.5-1.5b")
    for size in (8, 16)
}
REHEARSED = {"tiny-24x8-g4": ("random-tiny", Shape(24, 8), 4)}


def run(piece: str, device: str, rehearse: bool) -> Finding:
    model, shape, group_size = (REHEARSED if rehearse else PIECES)[piece]
    options = argparse.Namespace(
        device=device,
        num_generations=group_size,
        prompts=2 if rehearse else 8,
        trl_batch=4 if rehearse else 8,
        repeats=1 if rehearse else 3 - (shape.completion > LONG_COMPLETION),
        threads=1 if rehearse else THREADS,
    )
    probe = MachineProbe(device, options.threads)
    try:
        size, results = step_vs_trl.measure(options, model, shape, probe)
        machine = probe.machine
    finally:
        probe.close()
    rows = [[piece, *row[1:]] for row in step_vs_trl.rows_of(options, machine, size, shape, results)]
    ratios = step_vs_trl.ratios_of(results)
    bars = [
        Bar(f"{piece} training, times faster", ratios["training"], TRAINING_BAR),
        Bar(f"{piece} generation, times faster than generate", ratios["generation"], GENERATION_BAR),
    ]
    return Finding(rows, bars)


ABOUT = """
As `benchmarks/step_vs_trl.py`: the same random weights, prompts and number of tokens, 8 prompts a step, both in
bfloat16 autocast over float32 weights, TRL with micro-batches of 8 completions and transformers' `generate`;
medians of three steps (of completions of 1024 tokens: two) after one
that is not counted. Floors are of the matmul rate and the memory rate measured
beside it, attention left out; peak is `torch.cuda.max_memory_allocated`.
"""

PART = Part(
    name="step",
    title="A step against TRL's",
    about=ABOUT,
    columns=("piece", *step_vs_trl.COLUMNS[1:]),
    limit_s=480,
    pieces=tuple(PIECES),
    rehearsed=tuple(REHEARSED),
    run=run,
)
