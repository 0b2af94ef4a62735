"""Where the time of a step goes."""

from __future__ import annotations

from statistics import median

from grpo_cli.report.curves import known
from grpo_cli.report.finding import Finding
from grpo_cli.report.run import Run

USUAL = {"generate": 0.8, "reward": 0.25, "sync": 0.2}
"""By phase, the share of a step's time that is nothing to mend: generation is most of it in any run, rewards and
weight updates can be had beside it."""


def bottleneck(run: Run) -> Finding | None:
    """One phase takes most of a step."""
    shares = {phase: _share(run, phase) for phase in USUAL}
    over = {phase: share for phase, share in shares.items() if share > USUAL[phase]}
    if not over or len(run.rows) < 2:
        return None
    phase = max(over, key=lambda one: over[one] / USUAL[one])
    seconds = median(known(run.series("time/step")))
    return Finding(
        "bottleneck",
        0.2,
        f"{_NAMES[phase]} takes {over[phase]:.0%} of a step's {seconds:.3g} seconds.",
        "The rest waits for it.",
        _advice(run, phase),
    )


_NAMES = {"generate": "Generation", "reward": "Waiting for the rewards", "sync": "Handing over the weights"}


def _share(run: Run, phase: str) -> float:
    """Of the time of the middling step."""
    parts, wholes = known(run.series(f"time/{phase}")), known(run.series("time/step"))
    if not parts or not wholes or not median(wholes) > 0:
        return 0.0
    return median(parts) / median(wholes)


def _advice(run: Run, phase: str) -> str:
    generation = run.recipe.generation
    if phase == "sync":
        return (
            "Train an adapter (model.lora), which is all that then moves, or put the servers on the same network."
        )
    if phase == "reward":
        idle = [index for index, reward in enumerate(run.recipe.rewards) if not reward.workers]
        if idle:
            return f"Set rewards.{idle[0]}.workers: 8, so that groups are scored while others are generated."
        if not run.recipe.rewards:
            return "A faster get_reward of the environment."
        return (
            "More rewards.0.workers, rewards.0.isolate: true for functions that hold the interpreter, or faster "
            "ones."
        )
    if generation.engine == "transformers":
        return "On a GPU generation.engine: vllm; else a lower generation.max_completion_tokens."
    return "More servers in generation.server.urls, or a lower generation.max_completion_tokens."
