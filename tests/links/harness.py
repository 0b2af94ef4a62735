"""Trains over a link that fails as a seeded schedule says, and compares how the run ends.

The trainer is `grpo train`, the server one real `grpo serve` that all runs use, one after the other. Where this
user may have network namespaces each is in one of its own; elsewhere both are on the loopback address, with the
relay between them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from grpo_cli import cli
from grpo_cli.errors import RunError
from grpo_cli.launch.failures import EXIT_REQUEUE
from grpo_cli.record.metrics import read_metrics
from grpo_cli.rollout.server import connection
from grpo_cli.serve.protocol import HEARTBEAT_S
from tests.integration.serving import Serve
from tests.links.namespaces import enter, why_not
from tests.links.packets import SERVER, PacketLink
from tests.links.relay import Relay
from tests.links.schedules import FOR_THE_RUN, Schedule, Script, draw
from tests.processes import Command

TIMEOUT_S = 6.0
"""`generation.server.timeout_s` of each run."""

SILENCE_S = max(TIMEOUT_S, 2 * HEARTBEAT_S)
"""How long an answer may be silent."""

START_S = 60.0
"""How long a start and four steps may take on a busy machine."""

UNTIMED = ("time/", "tokens_per_second", "sync/")
"""Metrics that differ: times, and the bytes that were sent, which count what was sent again."""

WRONG_USE = 2


def limit_s(schedule: Schedule, faults: int) -> float:
    """Within which one start of a run must have ended.

    A fault costs what it lasts, and what it takes to see it: a silent request, a silent transfer, and the silent
    question whether the server is there, of which the last may have begun just before the wait was over.
    """
    lasting = sum(f.lasts_s for f in schedule.faults if f.kind not in FOR_THE_RUN and f.lasts_s < float("inf"))
    slowness = START_S * sum(f.kind in FOR_THE_RUN for f in schedule.faults)
    return START_S + slowness + lasting + faults * (4 * SILENCE_S + TIMEOUT_S)


def recipe_for(model: Path, key_file: Path, folder: Path) -> Path:
    """Write a recipe of four short steps, with evaluations, and completions shown before and after."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{"question " * (1 + i % 3)}{i}:"}}\n' for i in range(7)))
    recipe = {
        "model": {"name": str(model)},
        "data": {"name": str(prompts), "eval": {"name": str(prompts), "limit": 2}},
        "rewards": ["rewards.length:reward_len"],
        "generation": {
            "engine": "vllm_server", "num_generations": 2, "max_completion_tokens": 24,
            "server": {"api_key_file": str(key_file), "timeout_s": TIMEOUT_S},
        },
        "optim": {"learning_rate": 1e-3},
        "train": {"max_steps": 4, "prompts_per_step": 3, "save_every": 0, "eval_every": 2},
        "logging": {"trackers": [], "print_completions": 5},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def grpo_in(namespace: str | None, over_network: bool) -> None:
    """`grpo`, in another network, and without memory that it shares with the server if it shall have none."""
    if namespace is not None:
        enter(namespace)
    if over_network:
        connection.shares_memory = lambda info: False
    cli.main()


@dataclass(frozen=True)
class Session:
    """How one start of a run ended."""

    code: int | None
    """None if it had not ended within its limit."""
    output: str
    seconds: float
    limit_s: float


@dataclass
class Case:
    """A schedule and what became of it."""

    schedule: Schedule
    begun: list[str] = field(default_factory=list)
    """Faults that came about."""
    sessions: list[Session] = field(default_factory=list)
    wrong: str | None = None
    skipped: str | None = None


class Bench:
    """A server, a link to it, and runs over this link.

    Args:
        model: folder of a model that vLLM can serve.
        folder: for the runs.
        loopback: whether to do without namespaces although there may be some.
    """

    def __init__(self, model: Path, folder: Path, *, loopback: bool = False) -> None:
        self.folder = folder
        self.why_no_packets = "not wanted" if loopback else why_not()
        self.link = None if self.why_no_packets else PacketLink()
        serve = partial(Serve, model, *(("--host", "0.0.0.0") if self.link else ()))
        self.server = self.link.server.run(serve) if self.link else serve()
        self.relay = Relay(self.link.server.path if self.link else None, self.server.port)
        self.wanted: dict[str, Any] = {}
        try:
            self._inside(self.server.wait_ready)
            self._recipe = recipe_for(model, self.server.key_file, folder)
            session = self.session(Schedule(-1, "packets", "network", ()), folder / "whole", Script([]))
            assert session.code == 0, session.output
            self.wanted = state_of(folder / "whole")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.relay.close()
        self._inside(self.server.stop)
        if self.link:
            self.link.close()

    def _inside(self, call: Any) -> Any:
        return self.link.server.run(call) if self.link else call()

    def session(self, schedule: Schedule, run: Path, script: Script) -> Session:
        """Start a run, resumed if something is there, and wait for its end."""
        host, port = SERVER if self.link else "127.0.0.1", self.relay.port
        by_relay = schedule.layer == "relay" or not self.link
        if self.link:
            quiet = Script([]) if by_relay else script
            self.link.begin(quiet, schedule.number, port if by_relay else self.server.port)
        self.relay.begin(script if by_relay else Script([]))
        url = f"http://{host}:{port if by_relay else self.server.port}"
        settings = [f"train.output_dir={run}", f"generation.server.urls={json.dumps([url])}"]
        arguments = ["train", str(self._recipe), "--resume", *(x for one in settings for x in ("--set", one))]
        main = partial(grpo_in, self.link.trainer.path if self.link else None, schedule.transfers == "network")
        limit, began = limit_s(schedule, len(script.faults)), time.monotonic()
        process = Command(*arguments, environment=os.environ | {"OMP_NUM_THREADS": "1"}, main=main)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
            return Session(process.poll(), process.printed()[0], time.monotonic() - began, limit)
        finally:
            process.kill()
            process.wait()

    def case(self, seed: int, number: int) -> Case:
        """Run one schedule, and resume what it stopped."""
        case = Case(draw(seed, number, TIMEOUT_S))
        if case.schedule.layer == "packets" and not self.link:
            case.skipped = self.why_no_packets
            return case
        run = self.folder / f"{seed}-{number}"
        shutil.rmtree(run, ignore_errors=True)
        case.wrong = self._run_case(case, run)
        if not case.wrong:
            shutil.rmtree(run)
        return case

    def _run_case(self, case: Case, run: Path) -> str | None:
        """What went wrong."""
        script = Script([*case.schedule.faults])
        session = self.session(case.schedule, run, script)
        case.begun = [str(fault) for fault in script.begun]
        case.sessions.append(session)
        if wrong := wrong_end(session, case.schedule, run):
            return wrong
        if session.code != 0:
            session = self.session(case.schedule, run, Script([]))
            case.sessions.append(session)
            if session.code != 0 or "Traceback" in session.output:
                return f"over a good link it ended with {session.code}: {session.output[-3000:]}"
        try:
            return difference(state_of(run), self.wanted)
        except (OSError, RunError) as error:
            return f"{type(error).__name__}: {error}"


def wrong_end(session: Session, schedule: Schedule, run: Path) -> str | None:
    """What is wrong with the end of a run over a failing link."""
    said = f"{session.output[-3000:]}"
    if session.code is None:
        return f"no end within {session.limit_s:.0f} s: {said}"
    if "Traceback" in session.output:
        return f"a traceback: {said}"
    if session.code == EXIT_REQUEUE and schedule.away_s >= TIMEOUT_S:
        checkpoints = [path.name for path in run.glob("checkpoint-*")]
        if len(checkpoints) != 1 or "--resume" not in session.output:
            return f"stopped with checkpoints {checkpoints}: {said}"
        return None
    has_begun = (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size
    if session.code == WRONG_USE and "generation.server: " in session.output and not has_begun:
        return None if schedule.away_s >= TIMEOUT_S else f"it did not wait: {said}"
    return None if session.code == 0 else f"it ended with {session.code}: {said}"


def state_of(run: Path) -> dict[str, Any]:
    """What a run leaves: its model, its completions, and its metrics."""
    files = {
        f"{folder.name}/{path.relative_to(folder)}": path.read_bytes()
        for folder in (run / "final", run / "completions")
        for path in folder.rglob("*")
        if path.is_file()
    }
    rows = [
        {name: value for name, value in row.items() if not name.startswith(UNTIMED)}
        for row in read_metrics(run / "metrics.jsonl")
    ]
    return files | {f"metrics of step {row['step']}": row for row in rows}


def difference(state: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The names of what differs between two runs."""
    names = [name for name in [*wanted, *(state.keys() - wanted.keys())] if state.get(name) != wanted.get(name)]
    return f"these differ from the undisturbed run: {', '.join(names)}" if names else None


def table(cases: Sequence[Case]) -> Iterator[str]:
    """A line for each schedule."""
    yield "| schedule | weights by | what went wrong | exit | seconds | of at most | result |"
    yield "|---:|---|---|---|---:|---:|---|"
    for case in cases:
        result = f"skipped: {case.skipped}" if case.skipped else "same" if case.wrong is None else "WRONG"
        codes = ", then ".join(str(session.code) for session in case.sessions)
        seconds, limits = (
            " + ".join(f"{getattr(session, name):.0f}" for session in case.sessions)
            for name in ("seconds", "limit_s")
        )
        faults = "; ".join(case.begun) or "nothing came about"
        yield (
            f"| {case.schedule.number} | {case.schedule.transfers} | {faults} | {codes} | {seconds} | {limits} "
            f"| {result} |"
        )
    for case in cases:
        if case.wrong:
            yield f"\n--only {case.schedule.number}\n  {case.wrong}"
