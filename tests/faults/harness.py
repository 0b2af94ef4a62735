"""Kills the real training at points that follow from a seed, resumes it, and compares how it ends.

A case is a run that is hit up to three times. It follows from the seed, the system and its number alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from grpo_cli.errors import RunError
from grpo_cli.launch.failures import EXIT_REQUEUE
from grpo_cli.record.metrics import TIMES, read_metrics
from tests.episode.small_talk import STOPS
from tests.faults.disk import lose_power, start_watching
from tests.faults.points import (
    KILLS,
    POINTS,
    POWER_LOSS,
    SERVER_KILLS,
    SERVER_POINTS,
    TORN_WRITE,
    Fault,
    Plan,
    run_with,
)
from tests.faults.rounding import rounded_difference
from tests.processes import Command, free_port

MOST_FAULTS = 3
"""Times that one run is hit."""

ONLY_RESUMED = {"resume": 2}
"""Points that an undisturbed run does not come by, and their moments."""

LARGEST_TEAR_BITS = 20
"""A megabyte, which is more than any file of the tiny run has."""

SERVED = "vllm_server"
"""The system that generates on a server of its own, which may be killed, too."""

EPISODES = "episodes"
"""The system whose environment takes its time to answer."""

PATIENCE_S = 120.0
"""How long one start of a run may take on a busy machine."""

SERVED_PATIENCE_S = 500.0
"""The same where a server starts, which imports vLLM in three processes."""

SYSTEMS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "adapter with dropout": (1, {"model.lora": {"r": 2, "dropout": 0.2}}),
    "bfloat16": (1, {"model.dtype": "bfloat16"}),
    "ddp": (2, {"distributed.strategy": "ddp"}),
    "zero3": (2, {"distributed.strategy": "zero3"}),
    EPISODES: (
        1,
        {
            "data.system_prompt": "Talk.",
            "data.eval.system_prompt": "Talk.",
            "episode": {
                "environment": {
                    "path": "tests.episode.small_talk:SmallTalk",
                    "params": {"longest_pause_s": 0.01},
                },
                "max_turns": 3,
            },
            "generation.max_completion_tokens": 60,
            "generation.stop": STOPS,
        },
    ),
    "vllm_server": (1, {"generation.engine": "vllm_server", "generation.server": {"spawn": True}}),
}
"""Name to processes and settings that differ from those of `recipe_for`."""


def recipe_for(model: Path, folder: Path) -> Path:
    """Write a recipe of four short steps that uses much of what there is, with two checkpoints."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{"question " * (1 + i % 3)}{i}:"}}\n' for i in range(7)))
    recipe = {
        "model": {"name": str(model)},
        "data": {"name": str(prompts), "eval": {"name": str(prompts), "limit": 2}},
        "rewards": [
            "rewards.length:reward_len",
            {"path": "rewards.diversity:reward_num_unique_chars", "workers": 2},
        ],
        "generation": {"num_generations": 2, "max_completion_tokens": 6},
        "loss": {"beta": 0.05},
        "optim": {"learning_rate": 1e-3},
        "train": {
            "output_dir": str(folder / "run"), "max_steps": 4, "prompts_per_step": 3, "save_every": 2,
            "keep_checkpoints": 1, "eval_every": 3, "optimizer_steps_per_rollout": 2, "num_iterations": 2,
        },
        "logging": {"trackers": ["tensorboard"], "print_completions": 0},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@dataclass(frozen=True)
class Session:
    """How one start of a run ended."""

    codes: list[int]
    """Of its processes."""
    output: str
    was_struck: bool


@dataclass
class Case:
    """One run that was hit until it came to its end."""

    name: str
    faults: list[Fault] = field(default_factory=list)
    """Those that came about."""
    wrong: str | None = None
    """What differs from the undisturbed run, or went wrong on the way."""


class NoEnd(Exception):
    """A start of a run hangs."""


class Bench:
    """Runs of one system, with and without faults, in a folder of their own.

    Args:
        system: of `SYSTEMS`.
        model: folder of the model.
        folder: for the runs.
    """

    def __init__(self, system: str, model: Path, folder: Path) -> None:
        self.system = system
        self.is_served = system == SERVED
        self.folder = folder
        self.processes, settings = SYSTEMS[system]
        folder.mkdir(parents=True, exist_ok=True)
        self._recipe = recipe_for(model, folder)
        self._settings = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        whole, notes = folder / "whole", folder / "whole-notes"
        notes.mkdir()
        session = self.session(Plan(whole, notes, counts=True))
        assert session.codes == [0] * self.processes, session.output
        self.moments = [json.loads((notes / f"moments-{rank}.json").read_text()) for rank in range(self.processes)]
        self.whole = whole
        self.wanted = state_of(whole)

    def session(self, plan: Plan, struck_rank: int = 0) -> Session:
        """Start the run, resumed if something is there, and wait for its end."""
        settings = [f"train.output_dir={plan.run}", *self._settings]
        arguments = ["train", str(self._recipe), "--resume", *(x for one in settings for x in ("--set", one))]
        port = free_port()
        processes = []
        for rank in range(self.processes):
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
            if self.processes > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes}
                ranks |= {"LOCAL_WORLD_SIZE": self.processes, "MASTER_PORT": port}
                environment |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in ranks.items()}
            own = plan if rank == struck_rank else _without_fault(plan)
            processes.append(Command(*arguments, environment=environment, main=partial(run_with, own)))
        codes = _ends(processes, plan, SERVED_PATIENCE_S if self.is_served else PATIENCE_S)
        output = "".join(process.printed()[0] for process in processes)
        return Session(codes, output, (plan.notes / "struck").exists())

    def case(self, seed: int, number: int) -> Case:
        """Hit a run up to `MOST_FAULTS` times, and see that it ends as the undisturbed one."""
        case = Case(f"--seed {seed} --system '{self.system}' --only {number}")
        folder = self.folder / f"{seed}-{number}"
        try:
            case.wrong = self._run_case(case, random.Random(f"{seed}/{self.system}/{number}"), number, folder)
        except (NoEnd, OSError, RunError) as error:  # the latter two are of files that are not as they should be
            case.wrong = f"{type(error).__name__}: {error}"
        if not case.wrong:
            shutil.rmtree(folder)
        return case

    def _run_case(self, case: Case, rng: random.Random, number: int, folder: Path) -> str | None:
        """What went wrong; the faults that came about are added to the case."""
        run = folder / "run"
        run.mkdir(parents=True)
        for start in range(rng.randint(1, MOST_FAULTS)):
            fault, rank = self._draw(rng, number, start)
            plan = Plan(run, folder / f"notes-{start}", fault, watches_disk=fault.by == POWER_LOSS)
            plan.notes.mkdir()
            if plan.watches_disk:
                start_watching(run, plan.notes)
            session = self.session(plan, rank)
            if session.was_struck:
                case.faults.append(fault)
            if wrong := self._wrong_end(session, fault):
                return wrong
            if not session.was_struck:
                break
            if fault.by == POWER_LOSS:
                lose_power(run, plan.notes, random.Random(rng.random()))
                if wrong := _what_was_promised(session.output, run):
                    return wrong
        if not self.is_served or any(session.codes):  # a server is not started for a run that is done
            (folder / "notes").mkdir()
            session = self.session(Plan(run, folder / "notes"))
        if any(session.codes) or "Traceback" in session.output:
            return f"the last start ended with {session.codes}: {session.output[-3000:]}"
        if self.is_served or self.system == EPISODES:
            return rounded_difference(run, self.whole)
        return difference(state_of(run), self.wanted)

    def _draw(self, rng: random.Random, number: int, start: int) -> tuple[Fault, int]:
        """A fault and the rank that it hits. First faults of successive cases go through all points and kills."""
        rank = rng.randrange(self.processes)
        moments = self.moments[rank]
        if start:
            moments = moments | ONLY_RESUMED
        points = [name for name in POINTS | SERVER_POINTS if name in moments]
        kills = KILLS + SERVER_KILLS if self.is_served else KILLS
        point = rng.choice(points) if start else points[number % len(points)]
        by = rng.choice(kills) if start else kills[(number + number // len(points)) % len(kills)]
        moment = rng.randint(1, max(1, moments[point] // (start + 1)))  # a resumed run has fewer
        return Fault(point, moment, by, int(2 ** rng.uniform(0, LARGEST_TEAR_BITS))), rank

    def _wrong_end(self, session: Session, fault: Fault) -> str | None:
        """What is wrong with the end of a start that may have been hit."""
        if "Traceback" in session.output:
            return f"{fault}: a traceback: {session.output[-3000:]}"
        allowed = {0}
        if session.was_struck:
            allowed |= {
                "SIGTERM": {EXIT_REQUEUE, -signal.SIGTERM},
                "SIGUSR1": {EXIT_REQUEUE, -signal.SIGUSR1},
                TORN_WRITE: {-signal.SIGXFSZ},
                **{kill: {0} for kill in SERVER_KILLS},
            }.get(fault.by, {-signal.SIGKILL})
        own = [code for code in session.codes if code != -signal.SIGKILL] if self.processes > 1 else session.codes
        if not set(own) <= allowed:
            return f"{fault}: exit codes {session.codes}: {session.output[-3000:]}"
        return None


def _without_fault(plan: Plan) -> Plan:
    return Plan(plan.run, plan.notes, watches_disk=plan.watches_disk, counts=plan.counts)


def _ends(processes: Sequence[Command], plan: Plan, patience_s: float) -> list[int]:
    """Exit codes. As their launcher does, the others are killed when one ends with a failure."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes):
            break
        if any(code not in (None, 0, EXIT_REQUEUE) for code in codes):
            for process in processes:
                process.kill()
        time.sleep(0.01)
    else:
        for process in processes:
            process.kill()
        raise NoEnd(f"{plan.fault}: no end after {patience_s} s: {[p.printed()[0] for p in processes]}")
    return [process.wait() for process in processes]


def _what_was_promised(output: str, run: Path) -> str | None:
    """A checkpoint that a run had said it has written, and that a power loss has taken away, in words."""
    said = [line.partition("checkpoint written: ")[2] for line in output.splitlines()]
    steps = [int(line.rpartition("-")[2]) for line in said if line]
    there = [int(path.parent.name.rpartition("-")[2]) for path in run.glob("checkpoint-*/position.json")]
    if steps and max(there, default=0) < max(steps):
        return f"the checkpoint of step {max(steps)} was written and is gone: {sorted(os.listdir(run))}"
    return None


def state_of(run: Path) -> dict[str, Any]:
    """All that a run leaves: the files of its model, its last checkpoint and its completions, and its metrics."""
    last = max(run.glob("checkpoint-*"), default=run / "checkpoint-none")
    files = {
        f"{folder.name}/{path.relative_to(folder)}": path.read_bytes()
        for folder in (run / "final", last, run / "completions")
        for path in folder.rglob("*")
        if path.is_file()
    }
    rows = [json.dumps(_timeless(row)) for row in read_metrics(run / "metrics.jsonl")]
    return files | {"metrics.jsonl": rows, "left over": sorted(path.name for path in run.glob(".*.partial"))}


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(TIMES)}


def difference(state: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The names of what differs between two runs."""
    names = [name for name in [*wanted, *(state.keys() - wanted.keys())] if state.get(name) != wanted.get(name)]
    return f"these differ from the undisturbed run: {', '.join(names)}" if names else None


def table(cases: Sequence[Case]) -> Iterator[str]:
    """Points by place and kind; a case that ended otherwise counts against all of its faults."""
    counts: dict[str, Counter[str]] = {"same": Counter(), "all": Counter()}
    for case in cases:
        for fault in case.faults:
            for row in (fault.point, "total"):
                for column in (fault.by, "total"):
                    counts["all"][f"{row}/{column}"] += 1
                    counts["same"][f"{row}/{column}"] += case.wrong is None
    columns = [*KILLS, *SERVER_KILLS, "total"]
    yield "| place | " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for row in [*POINTS, *SERVER_POINTS, "total"]:
        cells = [f"{counts['same'][f'{row}/{column}']}/{counts['all'][f'{row}/{column}']}" for column in columns]
        yield f"| {row} | " + " | ".join(cells) + " |"
    for case in cases:
        if case.wrong:
            yield f"\n{case.name}\n  {'; '.join(map(str, case.faults))}\n  {case.wrong}"
