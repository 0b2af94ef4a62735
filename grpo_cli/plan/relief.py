"""What to change after a run was out of memory: single settings, each with what the plan then counts. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo_cli.plan.fit import MOST_PROCESSES, SMALLEST_MICROBATCH, Gpu, fits
from grpo_cli.plan.memory import GIB, MemoryPlan, memory_plan, total
from grpo_cli.plan.setup import Setup, setup_of
from grpo_cli.plan.shape import ModelSize
from grpo_cli.recipe.schema import LoraConfig, Recipe

SHOWN = 3
"""Settings that a message names."""

SHORTEST_COMPLETION, SMALLEST_GROUP = 32, 2

LESS = 0.95
"""A change that is named leaves no more than this share of what the failing phase takes. The plan does not count
the gaps between tensors, so that less would not be felt."""

Changes = dict[str, tuple[Any, Any]]
"""Key of the recipe to its value before and after."""


@dataclass(frozen=True)
class Relief:
    """A change of the recipe after which the plan fits."""

    changes: Changes
    peak: float
    """Bytes on each GPU after it."""

    def line(self, gib: float) -> str:
        """`train.max_tokens_per_microbatch: 8192 -> 4096 needs 61.0 GiB of 79.2`."""
        changed = ", ".join(f"{key}: {_yaml(old)} -> {_yaml(new)}" for key, (old, new) in self.changes.items())
        return f"{changed} needs {self.peak / GIB:.1f} GiB of {gib:.1f}"


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with other values, which are valid by themselves."""
    for key, (_, value) in changes.items():
        section, name = key.split(".")
        part = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: part})
    return recipe


def needed(plan: MemoryPlan, phase: str | None) -> float:
    """Bytes in a phase, or in the busiest."""
    return plan.peak if phase is None else total(plan.lasting) + total(plan.phases[phase])


def reliefs(recipe: Recipe, size: ModelSize, gib: float, phase: str | None = None) -> list[Relief]:
    """The mildest changes of single settings after which the plan fits, one for each setting.

    Args:
        recipe: with the number of processes that the run has.
        size: of the model, of known shape.
        gib: memory of each GPU.
        phase: of the plan in which memory ran out, if that is known: what does not lower it is left out.
    """
    now = memory_plan(setup_of(recipe), size)
    found = []
    for ladder in ladders(recipe):
        for changes in ladder:
            plan = memory_plan(setup_of(changed(recipe, changes)), size)
            if plan.peak <= gib * GIB and needed(plan, phase) <= LESS * needed(now, phase):
                found.append(Relief(changes, plan.peak))
                break
        if len(found) == SHOWN:
            break
    return found


def ladders(recipe: Recipe) -> Iterator[Iterator[Changes]]:
    """Each setting's values, the mildest first. What costs time only comes before what changes the training."""
    setup = setup_of(recipe)
    yield _halved(
        "train.max_tokens_per_microbatch", setup.pack_tokens, max(setup.shortest_pack, SMALLEST_MICROBATCH)
    )
    if not recipe.model.gradient_checkpointing:
        yield iter([{"model.gradient_checkpointing": (False, True)}])
    if setup.processes > 1 and recipe.distributed.deepspeed_config is None:
        better = [
            *(["zero2"] if not setup.traits.shards_gradients else []),
            *(["zero3"] if not setup.traits.shards_weights else []),
        ]
        yield iter([{"distributed.strategy": (setup.strategy, strategy)} for strategy in better])
    generation = recipe.generation
    yield _halved("generation.max_completion_tokens", generation.max_completion_tokens, SHORTEST_COMPLETION)
    yield _halved("generation.num_generations", generation.num_generations, SMALLEST_GROUP)
    if recipe.model.lora is None:
        yield iter([{"model.lora": (None, LoraConfig())}])
    if setup.traits.shards_optimizer and not recipe.distributed.cpu_offload:
        yield iter([{"distributed.cpu_offload": (False, True)}])
    if setup.engine != "vllm" and recipe.distributed.deepspeed_config is None:
        yield _more_processes(setup)


def _halved(key: str, value: int, least: int) -> Iterator[Changes]:
    smaller = value // 2
    while smaller >= least:
        yield {key: (value, smaller)}
        smaller //= 2


def _more_processes(setup: Setup) -> Iterator[Changes]:
    """`zero3` on twice as many GPUs, and so on."""
    strategy: Changes = {} if setup.traits.shards_weights else {"distributed.strategy": (setup.strategy, "zero3")}
    count = setup.processes * 2
    while count <= MOST_PROCESSES:
        yield {"distributed.processes": (setup.processes, count), **strategy}
        count *= 2


def advice(recipe: Recipe, size: ModelSize, gib: float, phase: str | None = None) -> str:
    """What the plan says about a run that was out of memory: what it counts, and up to three changes that fit."""
    if size.parameters is None or size.shape is None:
        unknown = size.source if size.parameters is None else "its config.json is of a kind not known here"
        return (
            f"the plan cannot count what would fit ({unknown}); lower {settings_by_hand(recipe)}, "
            "or set model.gradient_checkpointing or model.lora"
        )
    now = memory_plan(setup_of(recipe), size)
    parts = sorted([*now.lasting, *now.phases[phase or now.busiest]], key=lambda part: -part.bytes)[:3]
    largest = ", ".join(f"{part.name} {part.bytes / GIB:.1f}" for part in parts)
    where = "" if phase is None else f" in {'the ' * (phase == 'optimizer step')}{phase}"
    counted = f"the plan counts {needed(now, phase) / GIB:.1f} GiB of {gib:.1f}{where} ({largest})"
    if now.peak <= gib * GIB:
        counted += (
            ", which should have fitted: other processes may hold memory (nvidia-smi shows them), or it lies in "
            "pieces (PYTORCH_ALLOC_CONF=expandable_segments:True joins them)"
        )
    lines = [relief.line(gib) for relief in reliefs(recipe, size, gib, phase)]
    if lines:
        return "\n  ".join([f"{counted}; by the plan any of these fits:", *lines])
    if now.peak <= gib * GIB:
        return f"{counted}; lower {settings_by_hand(recipe)}"
    together = next(fits(setup_of(recipe), size, Gpu(gib, "this GPU", True)), None)
    if together is None:
        return f"{counted}; no setting makes it fit by the plan: take a smaller model, or GPUs with more memory"
    changes, plan = together
    all_of = ", ".join(f"{key} {value}" for key, value in changes.items())
    return f"{counted}; no setting alone is enough, by the plan {all_of} together need {plan.peak / GIB:.1f} GiB"


def settings_by_hand(recipe: Recipe) -> str:
    """The settings that most of the memory follows from, with their values."""
    generation = recipe.generation
    return (
        f"train.max_tokens_per_microbatch (now {recipe.train.max_tokens_per_microbatch or 'automatic'}), "
        f"generation.max_completion_tokens (now {generation.max_completion_tokens}) or "
        f"generation.num_generations (now {generation.num_generations})"
    )


def _yaml(value: Any) -> str:
    """A value as one writes it into a recipe."""
    if isinstance(value, LoraConfig):
        return "{}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
