"""The decode part of `benchmarks.gpu`: our engine's rollouts, decoding under CUDA graphs and without."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks._gpu_results import Finding, Part
from benchmarks._gpu_runs import make_run, wait_for
from benchmarks._machine import rates
from benchmarks._models import ModelSize

REPEATS = 3


@dataclass(frozen=True)
class Rollout:
    """What is generated."""

    model: str
    prompt: int
    completion: int
    group_size: int = 8
    prompts: int = 8

    @property
    def tokens(self) -> int:
        return self.prompts * self.group_size * self.completion


PIECES = {
    "qwen2.5-0.5b-1024x128": Rollout("random-qwen2.5-0.5b", 1024, 128),
    "qwen2.5-0.5b-256x1024": Rollout("random-qwen2.5-0.5b", 256, 1024),
    "qwen2.5-1.5b-1024x128": Rollout("random-qwen2.5-1.5b", 1024, 128),
}
REHEARSED = {"tiny": Rollout("random-tiny", 24, 8, 4, 2)}


def ways(engine: Any) -> dict[str, Any]:
    """What to set the engine's `graphs` to for each way to decode; None is without."""
    graphs = getattr(engine, "graphs", None)
    return {"eager": None} | ({} if graphs is None else {"graphs": graphs})


def measure(rollout: Rollout, run: Any, device: str) -> float:
    """Seconds of a rollout: the median, after one to compile."""
    prompts = [run.rollouts.dataset[index].token_ids for index in range(rollout.prompts)]
    seconds = []
    for repeat in range(1 + REPEATS):
        wait_for(device)
        start = time.perf_counter()
        keys = [(repeat, index) for index in range(len(prompts))]
        groups = run.rollouts.engine.generate(prompts, keys, rollout.group_size)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
        generated = sum(len(completion.token_ids) for group in groups for completion in group)
        if generated != rollout.tokens:
            raise RuntimeError(f"{generated} tokens, not {rollout.tokens}")
    return statistics.median(seconds[1:])


def rows_of(piece: str, rollout: Rollout, floor: float, seconds: Mapping[str, float]) -> list[list[str]]:
    """One for each way to decode."""
    return [
        [piece, way, f"{taken:.2f}", f"{1e3 * taken / rollout.completion:.1f}", f"{rollout.tokens / taken:,.0f}",
         f"{floor / taken:.0%}", f"{seconds['eager'] / taken:.2f}×"]
        for way, taken in seconds.items()
    ]  # fmt: skip


def recipe(rollout: Rollout, folder: str) -> dict[str, Any]:
    return {
        "generation": {"num_generations": rollout.group_size, "max_completion_tokens": rollout.completion},
        "train": {"output_dir": folder, "max_steps": 1, "prompts_per_step": rollout.prompts},
    }


def run(piece: str, device: str, rehearse: bool) -> Finding:
    rollout = (REHEARSED if rehearse else PIECES)[piece]
    read_bytes = rates(device, 1 if rehearse else 12)["read_bytes"]
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        built = make_run(
            rollout.model,
            device,
            recipe(rollout, folder),
            prompts=rollout.prompts,
            prompt=rollout.prompt,
            note=lambda text: notes.append(f"{piece}: {text}."),
        )
    size = ModelSize.of(built.learner.model)
    floor = 2 * (size.body + size.head) * rollout.completion / read_bytes
    seconds = {}
    for way, graphs in ways(built.rollouts.engine).items():
        built.rollouts.engine.graphs = graphs
        seconds[way] = measure(rollout, built, device)
    if "graphs" not in seconds:
        notes.append(f"{piece}: the engine has no CUDA graphs here.")
    return Finding(rows_of(piece, rollout, floor, seconds), notes=notes)


ABOUT = f"""
Rollouts of our own engine, 8 prompts × 8 completions of forced length in bfloat16: medians of {REPEATS} after
one. The floor is reading every weight in bfloat16 once for each token of a completion at the memory rate
measured beside it. A token's time is the rollout's over a completion's tokens, prompts included.
"""

PART = Part(
    name="decode",
    title="Decoding",
    about=ABOUT,
    columns=("piece", "decoding", "s", "ms a token", "tokens/s", "of memory floor", "faster"),
    limit_s=300,
    pieces=tuple(PIECES),
    rehearsed=tuple(REHEARSED),
    run=run,
)
