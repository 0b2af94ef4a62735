"""What sharing costs over several processes of one machine: training, weight updates, bytes on the wire.

The training phase of our loop under each strategy is set beside torch's DistributedDataParallel around the same
transformers model, a row for each completion, on the same tokens; a weight update of a receiver beside a plain
copy of as many bytes; the bytes that processes send each other in an optimizer step beside the least that the
strategy needs. CPU only, one thread a process: it measures overhead, not the speed of a cluster.

    python -m benchmarks.scaling_processes [--processes 1 2 4] [--repeats 3] [--model tiny|smol] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._machine import MachineProbe
from benchmarks._models import DEFAULT_MODEL, parse_shapes
from benchmarks._processes import ProcessGroups
from benchmarks._report import Report
from grpo_cli.launch.launcher import available_cores

if TYPE_CHECKING:
    from benchmarks._sharing import Visit, Work

RIVAL = "torch DDP"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
UPDATED = ("ddp", "zero3")
"""Strategies whose weight updates are measured: whole weights, and weights that are shared out."""

DEFAULTS = {"tiny": ("64x32", 8, 2, 3), "smol": ("64x16", 4, 1, 2)}
"""Shape, prompts, measured steps of a visit, repeats."""

TOLERANCE = 1e-3
"""Relative difference of gradient norms between systems that do the same work."""

Visits = dict[tuple[str, int], list[list["Visit"]]]
"""By system and processes: for each repetition, what each rank saw."""


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the overhead of training in several processes of one machine")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", choices=tuple(DEFAULTS), default="tiny", help="smol is that of `make model`")
    parser.add_argument("--strategies", nargs="+", choices=(*STRATEGIES, "fsdp"), default=STRATEGIES)
    parser.add_argument("--shape", help="tokens of a prompt and a completion, as 64x32")
    parser.add_argument("--prompts", type=int, help="of a step, over all processes")
    parser.add_argument("--num-generations", type=int, default=4)
    parser.add_argument("--token-budget", type=int, default=512, help="tokens of a forward pass")
    parser.add_argument("--steps", type=int, help="measured in a visit, after one that is not")
    parser.add_argument("--repeats", type=int, help="visits to each system")
    parser.add_argument("--updates", type=int, default=3, help="of a receiver's weights in a visit")
    parser.add_argument("--markdown", type=Path, help="write the tables there, too")
    options = parser.parse_args()
    for name, default in zip(("shape", "prompts", "steps", "repeats"), DEFAULTS[options.model], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, default)
    (options.shape,) = parse_shapes(options.shape)
    options.processes = sorted(set(options.processes))
    if options.model == "smol" and not Path(DEFAULT_MODEL).is_dir():
        parser.error(f"--model smol: there is no {DEFAULT_MODEL} here; run make model first")
    if options.prompts < options.processes[-1]:
        parser.error(
            f"--prompts {options.prompts} leaves some of {options.processes[-1]} processes without a group"
        )
    return options


def measure(options: argparse.Namespace, groups: ProcessGroups, work: Work) -> Visits:
    """Visit every system with every number of processes in turns."""
    visits: Visits = defaultdict(list)
    for repeat in range(options.repeats):
        for count in options.processes:
            for system in (RIVAL, *options.strategies):
                task = replace(
                    work,
                    count=repeat == 0 and count > 1,
                    updates=options.updates if system in UPDATED else 0,
                )
                start = time.perf_counter()
                arguments = ("plain", task) if system == RIVAL else ("ours", system, task)
                visits[system, count].append(groups.run(count, *arguments))
                seconds = step_seconds(visits[system, count][-1:])
                taken = time.perf_counter() - start
                print(f"{repeat + 1}: {count} × {system}: {seconds:.2f} s a step, {taken:.0f} s", file=sys.stderr)
    return visits


def step_seconds(visits: Sequence[Sequence[Visit]]) -> float:
    """The median step; a step lasts until its slowest process is done."""
    steps = [max(ranks) for visit in visits for ranks in zip(*(one.train for one in visit), strict=True)]
    return statistics.median(steps)


def check_same_work(visits: Visits) -> float:
    """The gradient norm of the first step, which all systems must agree on.

    Raises:
        RuntimeError: they do not.
    """
    norms = {key: visit[0].grad_norm for key, runs in visits.items() for visit in runs}
    low, high = min(norms.values()), max(norms.values())
    if high - low > TOLERANCE * high:
        raise RuntimeError(f"systems differ in the gradient norm of their first step: {norms}")
    return high


def training_rows(visits: Visits, tokens: int, processes: Sequence[int], cores: int) -> list[list[str]]:
    rates = {key: tokens / step_seconds(runs) for key, runs in visits.items()}
    rows = []
    for (system, count), rate in sorted(rates.items(), key=lambda item: item[0][1]):
        first = rates[system, processes[0]]
        ideal = first * min(count, cores) / min(processes[0], cores)
        rows.append(
            [
                system,
                str(count),
                str(visits[system, count][0][0].packs),
                f"{tokens / rate:.3f}",
                f"{rate:.1f}",
                f"{rate / rates[RIVAL, count]:.2f}×",
                f"{rate / ideal:.2f}",
            ]
        )
    return rows


def update_rows(visits: Visits) -> list[list[str]]:
    rows = []
    for (system, count), runs in visits.items():
        if system not in UPDATED:
            continue
        update = statistics.median(visit[0].update for visit in runs)
        copy = statistics.median(visit[0].copy for visit in runs)
        size = runs[0][0].update_bytes
        rows.append(
            [system, str(count), f"{size / 1e6:.1f}", f"{copy:.4f}", f"{update:.4f}", f"{update / copy:.1f}×"]
        )
    return sorted(rows)


def byte_rows(visits: Visits) -> tuple[list[list[str]], list[list[str]]]:
    """Of tensors, and of control: rank 0's, in one step."""
    from benchmarks._collectives import checked_ring_bytes, least_ring_bytes

    tensors, control = [], []
    for (system, count), runs in sorted(visits.items(), key=lambda item: item[0][1]):
        seen = runs[0][0]
        if seen.traffic is None:
            continue
        strategy: Any = "ddp" if system == RIVAL else system
        expected = checked_ring_bytes(strategy, seen.parameters, count, seen.packs)
        least = least_ring_bytes(strategy, 4 * seen.parameters, count, seen.packs)
        moved = seen.traffic.ring_bytes
        tensors.append(
            [
                f"{system} × {count}",
                seen.traffic.summary(),
                str(seen.packs),
                f"{moved / 1e6:.1f}",
                f"{least / 1e6:.1f}",
                f"{moved / least:.2f}",
                f"{moved / expected:.2f}",
            ]
        )
        if system != RIVAL:
            calls, size = seen.traffic.control_calls, seen.traffic.control
            control.append([system, str(count), str(calls), f"{size / 1e3:.1f}"])
    return tensors, control


def tell(report: Report, options: argparse.Namespace, visits: Visits, cores: int) -> None:
    """Print the tables with what must be known to read them."""
    shape, group, first = options.shape, options.num_generations, options.processes[0]
    tokens = options.prompts * group * shape.completion
    parameters = visits[RIVAL, first][0][0].parameters
    report.table(
        f"Training phase of {options.model}, {parameters / 1e6:.1f} million weights: {options.prompts} prompts × "
        f"{group} completions, {shape}, packs of up to {options.token_budget} tokens; medians of "
        f"{options.repeats} visits × {options.steps} steps",
        ("system", "processes", "packs", "s/step", "completion tokens/s", f"over {RIVAL}", "of ideal"),
        training_rows(visits, tokens, options.processes, cores),
    )  # fmt: skip
    report.lines(*training_notes(options, cores, check_same_work(visits)))
    if options.updates and set(UPDATED) & set(options.strategies):
        report.table(
            f"One weight update of a receiver on this host, medians of {options.repeats} visits",
            ("strategy", "processes", "MB", "plain copy s", "update s", "over copy"),
            update_rows(visits),
        )
    tensors, control = byte_rows(visits)
    if not tensors:
        return
    report.table(
        "Bytes of one optimizer step, counted on rank 0; MB through each process of a ring",
        ("system", "operations", "packs", "MB", "least MB", "over least", "over grpo check"),
        tensors,
    )
    report.lines(*byte_notes())
    report.table(
        "Control: objects (completions, rewards, losses, metrics) of one whole step",
        ("strategy", "processes", "collectives", "KB"),
        control,
    )


def training_notes(options: argparse.Namespace, cores: int, grad_norm: float) -> list[str]:
    shape, group = options.shape, options.num_generations
    ours, rows = shape.prompt + group * shape.completion, group * (shape.prompt + shape.completion)
    return [
        f"One thread a process. This machine has {cores} cores, which more processes than that share: speed over "
        "processes is not what is measured here, the overhead is. Ideal is the same system's speed at "
        f"n = {options.processes[0]}, multiplied as min(n, {cores}) grows.",
        f"{RIVAL} computes a row for each completion, {rows} tokens a group; ours {ours}, each prompt once, and "
        "under the clock also entropies, metrics and the exchange of losses.",
        f"Same work: all systems' gradient norm in the first step is {grad_norm:.5f}, within {TOLERANCE:g}.",
    ]


def byte_notes() -> list[str]:
    return [
        "Of B bytes a ring of n moves (n-1)/n B through each process for a gather or a scatter, twice that for a "
        "sum that all get. The least, in bytes of all weights: ddp 2, zero1 2, zero2 packs + 1, zero3 and fsdp "
        "3 × packs. What grpo check expects is 3 for zero1 and 2 × packs + 1 for zero2.",
        "Above the least: zero1 and zero2, since DeepSpeed sums gradients for all processes where each needs its "
        "share alone (its use_multi_rank_bucket_allreduce, on by default for every backend).",
        "Below it: zero3, since weights of up to 1e5 elements stay whole and are gathered once, after the "
        "optimizer's step; fsdp, since what is in no decoder layer stays from forward to backward.",
    ]


def main() -> None:
    options = parse_options()
    with closing(MachineProbe("cpu", 1)) as probe, tempfile.TemporaryDirectory(prefix="grpo-scaling-") as folder:
        groups = ProcessGroups("benchmarks._sharing", Path(folder, "log"))
        model = (folder, options.model, options.prompts, options.shape.prompt)
        (texts,) = groups.run(1, "make_model", *model)
        from benchmarks._sharing import Work

        work = Work(
            folder=folder,
            texts=tuple(texts),
            completion=options.shape.completion,
            group_size=options.num_generations,
            token_budget=options.token_budget,
            steps=options.steps,
            updates=0,
            count=False,
        )
        visits = measure(options, groups, work)
        probe.measure()
        machine = probe.machine
    report = Report()
    tell(report, options, visits, available_cores())
    report.lines(machine.line())
    report.write(options.markdown)


if __name__ == "__main__":
    main()
