"""The memory part of `benchmarks.gpu`: what `grpo check` plans against what tensors take, phase by phase."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks._gpu_arithmetic import GIB
from benchmarks._gpu_results import Finding, Part
from benchmarks._gpu_runs import Peaks, make_run, train
from benchmarks._report import Bar

TOLERANCE = 0.1
"""Of what was measured."""

MODELS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"dtype": "bfloat16", "lora": {"r": 16}},
    "checkpointing": {"gradient_checkpointing": True},
}
"""The `model` section of each recipe."""
PHASES = ("generation", "training", "optimizer step")


def recipe(model: Mapping[str, Any], prompt: int, completion: int, prompts: int, folder: str) -> dict[str, Any]:
    """All prompts and completions as long as they may be, so that packs and caches are as full as planned."""
    return {
        "model": dict(model),
        "data": {"max_prompt_tokens": prompt},
        "generation": {"num_generations": 8, "max_completion_tokens": completion},
        "train": {"output_dir": folder, "max_steps": 3, "prompts_per_step": prompts, "save_every": 0},
        "logging": {"trackers": []},
    }


def planned_bytes(run: Any) -> dict[str, float]:
    """Of each phase, by `grpo check`'s arithmetic; without CUDA's own, which no tensor shows."""
    from grpo_cli.plan.memory import CUDA_BYTES, memory_plan, total
    from grpo_cli.plan.setup import setup_of
    from grpo_cli.plan.shape import ModelSize, shape_of

    shape = shape_of(run.learner.model.config.to_dict())
    assert shape is not None, "a random model has a known shape"
    plan = memory_plan(setup_of(run.learner.recipe), ModelSize(shape.parameters, shape, "the model"))
    lasting = total(plan.lasting) - CUDA_BYTES
    return {phase: lasting + total(plan.phases[phase]) for phase in PHASES}


def watch(run: Any, peaks: Peaks) -> None:
    """Count each phase of a step by itself: what comes between generation and the optimizer's step is training."""
    engine, strategy = run.rollouts.engine, run.learner.strategy
    generate, step = engine.generate, strategy.step

    def generating(*arguments: Any, **named: Any) -> Any:
        with peaks.of("generation"):
            groups = generate(*arguments, **named)
        peaks.begin()
        return groups

    def stepping() -> Any:
        peaks.end("training")
        with peaks.of("optimizer step"):
            return step()

    engine.generate, strategy.step = generating, stepping


def finding(piece: str, planned: Mapping[str, float], measured: Mapping[str, float]) -> Finding:
    """A row for each phase and one for the peak, which is judged."""
    pairs = {phase: (planned[phase], measured[phase]) for phase in PHASES}
    pairs["peak"] = max(planned.values()), max(measured.values())
    rows = [
        [piece, phase, f"{plan / GIB:.2f}", f"{taken / GIB:.2f}", f"{plan / taken - 1:+.0%}"]
        for phase, (plan, taken) in pairs.items()
    ]
    plan, taken = pairs["peak"]
    bar = Bar(f"{piece} plan, off the measured peak by", abs(plan / taken - 1), TOLERANCE, at_most=True)
    return Finding(rows, [bar])


def run(piece: str, device: str, rehearse: bool) -> Finding:
    name, prompt, completion, prompts = (
        ("random-tiny", 24, 8, 2) if rehearse else ("random-qwen2.5-0.5b", 1024, 128, 8)
    )
    with tempfile.TemporaryDirectory() as folder:
        sections = recipe(MODELS[piece], prompt, completion, prompts, f"{folder}/run")
        built = make_run(name, device, sections, prompts=prompts, prompt=prompt)
        planned = planned_bytes(built)
        peaks = Peaks(device)
        watch(built, peaks)
        train(built)
    return finding(piece, planned, peaks.allocated)


ABOUT = """
Three steps of Qwen2.5-0.5B, 8 prompts of 1024 tokens × 8 completions of 128, engine transformers: what `grpo
check` expects of each phase (without its estimate for CUDA itself) beside `torch.cuda.max_memory_allocated` in
it. `full` and `checkpointing` train float32 weights, `lora` rank 16 over bfloat16.
"""

PART = Part(
    name="memory",
    title="The memory plan",
    about=ABOUT,
    columns=("recipe", "phase", "planned GiB", "measured GiB", "plan is"),
    limit_s=240,
    pieces=tuple(MODELS),
    rehearsed=("full",),
    run=run,
)
