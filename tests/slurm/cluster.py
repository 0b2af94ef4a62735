"""A Slurm cluster of five nodes on this machine, for tests; `emulator/up.sh` says what it is made of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

EMULATOR = Path(__file__).parent / "emulator"
SCRIPTS = Path(__file__).parents[2] / "slurm"
NODES = 5

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "runuser", "curl")

PACKAGES = "slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins iproute2 procps curl"
"""Debian's, which hold these programs."""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


def why_not() -> str | None:
    """What keeps this machine from running a cluster."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"no {', '.join(missing)} here: apt-get install --no-install-recommends {PACKAGES}"
    if os.geteuid() != 0:
        return "emulated nodes have networks of their own, which only root can make"
    return None


@dataclass(frozen=True)
class JobState:
    name: str
    """COMPLETED, RUNNING, ..."""
    exit_code: int
    restarts: int

    @property
    def is_over(self) -> bool:
        return self.name in ENDED


class Cluster:
    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def start(self) -> None:
        self._emulator("up.sh")

    def stop(self) -> None:
        self._emulator("down.sh")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _emulator(self, script: str) -> None:
        # Its daemons would keep a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                ["bash", str(EMULATOR / script)], env={**os.environ, "R": str(self.folder)},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=120, check=False,
            )  # fmt: skip
            output.seek(0)
            assert done.returncode == 0, output.read()

    def run(self, *command: str, **variables: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, script: str, folder: Path, *options: str, **variables: str) -> Job:
        """Submit one of `slurm/`; it runs in `folder`."""
        where = [f"--chdir={folder}", *options, str(SCRIPTS / script)]
        job_id = self.run("sbatch", "--parsable", *where, **variables).strip()
        name = re.search("--job-name=(.*)", (SCRIPTS / script).read_text())
        assert name is not None
        return Job(self, job_id, folder, f"{name[1]}-{job_id}")

    def processes(self) -> list[str]:
        """Command lines of what runs on the nodes, other than Slurm's own."""
        commands = []
        for node in range(1, NODES + 1):
            for pid in self.run("ip", "netns", "pids", f"slemu-{node}").split():
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue  # it has ended
                if command and not command.startswith("slurm"):
                    commands.append(command)
        return commands


@dataclass(frozen=True)
class Job:
    cluster: Cluster
    id: str
    folder: Path
    name: str

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def logs(self) -> Path:
        return self.run_folder / f"slurm-{self.id}"

    def log(self, pattern: str = "*.log") -> str:
        """The job's own log and those of its steps."""
        files = [self.folder / f"{self.name}.log", *sorted(self.logs.glob(pattern))]
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')}" for file in files if file.exists())

    def state(self) -> JobState:
        text = self.cluster.run("scontrol", "show", "job", self.id)
        found = [re.search(rf"\b{key}=(\w+)", text) for key in ("JobState", "ExitCode", "Restarts")]
        name, code, restarts = (match[1] for match in found if match is not None)
        return JobState(name, int(code), int(restarts))

    def wait(self, timeout_s: float) -> JobState:
        """Its state when it is over, and nothing of it runs any more."""
        try:
            self.wait_until(lambda: self.state().is_over, timeout_s)
        except AssertionError:
            self.cluster.run("scancel", self.id)
            raise
        deadline = time.monotonic() + 20
        while self.cluster.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not self.cluster.processes(), "left on the nodes after the job"
        return self.state()

    def wait_until(self, condition: Callable[[], object], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s\n{self.log()}"
            time.sleep(0.3)

    def ask_to_stop(self) -> None:
        """As Slurm does before the time limit."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.id)
