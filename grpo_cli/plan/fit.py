"""Whether a memory plan fits a GPU, and if not, the smallest change of the recipe that makes it fit. No torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace

from grpo_cli.errors import UserError
from grpo_cli.plan.memory import GIB, MemoryPlan, memory_plan
from grpo_cli.plan.setup import Setup
from grpo_cli.plan.shape import ModelSize
from grpo_cli.recipe.schema import LoraConfig

ASSUMED_GPU_GIB = 80.0
ASSUMED_HOST_GIB = 1024.0
GPUS_OF_A_NODE = 8
MOST_PROCESSES = 512
SMALLEST_MICROBATCH = 1024
NVIDIA_SMI_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Gpu:
    """The memory of each GPU, which a plan has to fit into."""

    gib: float
    source: str
    """Where the figure is from, for messages."""
    is_known: bool
    """Whether it was found or given; otherwise it is an assumption."""
    is_here: bool = False
    """Whether it is a GPU of this machine, whose host memory is then looked at too."""


def gpu_of(given: float | None) -> Gpu:
    """`--gpu-memory`, else the smallest GPU of this machine, else an assumption."""
    if given is not None:
        return Gpu(given, "--gpu-memory", True)
    found = gpu_memory()
    if found is not None:
        return Gpu(found, "this machine's; --gpu-memory for others", True, is_here=True)
    return Gpu(ASSUMED_GPU_GIB, "assumed; --gpu-memory says otherwise", False)


def gpu_memory() -> float | None:
    """GiB of the smallest GPU that nvidia-smi finds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
        return min((float(line) / 1024 for line in done.stdout.split()), default=None)
    except (OSError, subprocess.SubprocessError, ValueError):  # a driver that does not answer
        return None


def memory_rows(setup: Setup, size: ModelSize, gpu: Gpu) -> list[tuple[str, str]]:
    """The plan as `grpo check` prints it."""
    if size.parameters is None:
        return [("memory", size.source)]
    plan = memory_plan(setup, size)
    where = f"each of {setup.processes} GPUs ({setup.strategy})" if setup.processes > 1 else "a GPU"
    missing = "" if size.shape else "; without activations, whose size needs a config.json of a known kind"
    rows = [
        ("parameters", f"{size.parameters:,}, by {size.source}"),
        ("memory", f"{_gib(plan.peak)} on {where} of {gpu.gib:g} GiB ({gpu.source}), in {plan.busiest}{missing}"),
    ]
    rows += [(f"  {part.name}", f"{_gib(part.bytes)}: {part.detail}") for part in plan.lasting if part.bytes]
    for phase, parts in plan.phases.items():
        needed = [part for part in parts if part.bytes]
        if needed:
            shown = "; ".join(f"{part.name} {_gib(part.bytes)} ({part.detail})" for part in needed)
            rows.append((f"  in {phase}", f"{_gib(sum(part.bytes for part in needed))}: {shown}"))
    if plan.host:
        node = plan.host * min(setup.processes, GPUS_OF_A_NODE)
        rows.append(("host", f"{_gib(plan.host)} of CPU memory for each process, {_gib(node)} for a node's"))
    return [*rows, ("loading", loading_row(plan, setup, size.parameters, gpu))]


def loading_row(plan: MemoryPlan, setup: Setup, parameters: int, gpu: Gpu) -> str:
    """What loading needs of the first node's host memory, compared with what it has.

    One process reads the whole model and sends it to the others. Under `zero3` all processes of a node read it,
    but they share the same pages of memory. What is offloaded comes on top.
    """
    needed = parameters * setup.weight_bytes + plan.host * min(setup.processes, GPUS_OF_A_NODE)
    has, source = (_host_memory(), "this machine's") if gpu.is_here else (ASSUMED_HOST_GIB, "assumed")
    text = f"{_gib(needed)} of the first node's {has:.0f} GiB of CPU memory ({source})"
    return f"{text}: more than there is; the model cannot be loaded there" if needed > has * GIB else text


def _host_memory() -> float:
    """GiB of this machine's memory."""
    import psutil

    total: int = psutil.virtual_memory().total
    return total / GIB


def misfit(setup: Setup, size: ModelSize, gpu: Gpu) -> str | None:
    """Why the plan does not fit and what would; None if it fits, or if too little is known to say."""
    if size.parameters is None:
        return None
    plan = memory_plan(setup, size)
    if plan.peak <= gpu.gib * GIB:
        return None
    parts = sorted([*plan.lasting, *plan.phases[plan.busiest]], key=lambda part: -part.bytes)[:3]
    largest = ", ".join(f"{part.name} {_gib(part.bytes)}" for part in parts)
    found = next(fits(setup, size, gpu), None)
    if found is None:
        advice = "no setting makes it fit; take a smaller model, or GPUs with more memory"
    else:
        changes, changed = found
        *first, last = [f"{key} {value}" for key, value in changes.items()]
        shown = f"{', '.join(first)} and {last}" if first else last
        advice = f"with {shown} it takes {_gib(changed.peak)}"
    return f"it needs {_gib(plan.peak)} on each GPU of {gpu.gib:g} GiB (most of it {largest}); {advice}"


def check_fit(setup: Setup, size: ModelSize, gpu: Gpu) -> str | None:
    """A line about a GPU that is only assumed and does not suffice.

    Raises:
        UserError: the GPU is known, and the plan does not fit.
    """
    problem = misfit(setup, size, gpu)
    if problem is not None and gpu.is_known:
        raise UserError(f"the run does not fit into memory: {problem}")
    return None if problem is None else f"on GPUs of {gpu.gib:g} GiB it would not fit: {problem}"


def fits(setup: Setup, size: ModelSize, gpu: Gpu) -> Iterator[tuple[dict[str, str], MemoryPlan]]:
    """Changes (key, value) after which the plan fits, the cheapest first, and that plan."""
    for candidate in candidates(setup):
        plan = memory_plan(candidate, size)
        if plan.peak <= gpu.gib * GIB:
            yield changes_between(setup, candidate), plan


def candidates(setup: Setup) -> Iterator[Setup]:
    """What could be changed: first what costs time only, then what needs GPUs, then what changes the training."""
    at_hand = [setup]
    if setup.processes > 1:
        if not setup.traits.shards_gradients:
            at_hand.append(replace(setup, strategy="zero2"))
        if not setup.traits.shards_weights:
            at_hand.append(replace(setup, strategy="zero3"))
    sharded = setup if setup.traits.shards_weights else replace(setup, strategy="zero3")
    first = GPUS_OF_A_NODE * (setup.processes // GPUS_OF_A_NODE + 1)
    counts = range(first, MOST_PROCESSES + 1, GPUS_OF_A_NODE)
    more = [replace(sharded, processes=count, gradient_checkpointing=True) for count in counts]
    engines = [setup.engine] + ["vllm_server"] * (setup.engine in ("transformers", "vllm"))
    for engine in engines:
        for base in at_hand:
            yield from lighter(replace(base, engine=engine))
        if engine != "vllm":  # which is for one process
            for base in more:
                yield replace(base, engine=engine)
    for engine in engines:
        yield from lighter(replace(sharded, cpu_offload=True, engine=engine))
    if setup.lora is None:
        for base in (setup, sharded):
            yield from lighter(replace(base, lora=LoraConfig(), has_reference=False))


def lighter(setup: Setup) -> Iterator[Setup]:
    """The same with smaller activations."""
    yield setup
    checkpointed = replace(setup, gradient_checkpointing=True)
    yield checkpointed
    tokens = setup.pack_tokens // 2
    while tokens >= max(setup.shortest_pack, SMALLEST_MICROBATCH):
        yield replace(checkpointed, pack_tokens=tokens)
        tokens //= 2


def changes_between(before: Setup, after: Setup) -> dict[str, str]:
    """The recipe's keys that differ."""
    keys = {
        "distributed.strategy": "strategy",
        "distributed.processes": "processes",
        "model.gradient_checkpointing": "gradient_checkpointing",
        "train.max_tokens_per_microbatch": "pack_tokens",
        "distributed.cpu_offload": "cpu_offload",
        "model.lora": "lora",
        "generation.engine": "engine",
    }
    changes = {}
    for key, name in keys.items():
        new = getattr(after, name)
        if new != getattr(before, name):
            changes[key] = "{}" if name == "lora" else str(new).lower()  # as YAML writes true
    return changes


def _gib(count: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if count >= size / 10:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
