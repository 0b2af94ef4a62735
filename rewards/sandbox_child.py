"""The half of `rewards.sandbox` that runs inside the child process. Started as a script; never import it.

It forks. The parent stays behind as the supervisor, which keeps the time and kills what is left; the child
limits itself and becomes the program. Standard library only, and little of it: it starts once per completion.

Both report over one pipe, each line behind a token that `rewards.sandbox` made for this run: "started",
"finished" (the last line of the source ran) and "timed out".
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from types import CodeType, FrameType, ModuleType

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MORE_PROCESSES = 64


def main() -> None:
    # The trainer's own choices are inherited, and would keep the supervisor from hearing of time and death.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A scheduler sends it to every process of a job; it is for the trainer.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    job = json.load(sys.stdin)
    prefix = job["token"] + " "
    os.write(report, f"{prefix}started\n".encode())

    # Orphans then become children of this process, wherever they hide, and can be killed.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    program = os.fork()
    if program:
        _supervise(program, job["timeout_s"], f"{prefix}timed out\n".encode(), report)

    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _set_limits(job["memory_bytes"], job["cpu_s"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["solution.py"]

    # Compiled before anything runs: no part can change what a later one says.
    parts = [compile(part, f"part{n}.py", "exec", dont_inherit=True) for n, part in enumerate(job["parts"])]
    del job
    _run(parts)
    os.write(report, f"{prefix}finished\n".encode())


def _run(parts: list[CodeType]) -> None:
    # A module of its own that is registered: dataclasses and pickle look names up there.
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    for part in parts:
        exec(part, module.__dict__)


def _supervise(program: int, timeout_s: float, message: bytes, report: int) -> None:
    """Wait for the program, kill it when its time is over, kill what it leaves, and end as it ended."""

    def time_is_over(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGALRM:
            os.write(report, message)
        with suppress(ProcessLookupError):
            os.kill(program, signal.SIGKILL)

    signal.signal(signal.SIGTERM, time_is_over)
    signal.signal(signal.SIGALRM, time_is_over)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    _, status = os.waitpid(program, 0)
    # Once it is reaped, its number may belong to someone else.
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(ProcessLookupError):
        os.killpg(program, signal.SIGKILL)
    _kill_descendants()

    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _kill_descendants(patience_s: float = 1.0) -> None:
    """Kill children until none is left. Those of the killed become ours: every generation gets its turn."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _children() -> list[int]:
    me = os.getpid()
    try:
        with open(f"/proc/self/task/{me}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []


def _set_limits(memory_bytes: int, cpu_s: int) -> None:
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, cpu_s)
    _limit(resource.RLIMIT_FSIZE, 16 * 1024 * 1024)
    _limit(resource.RLIMIT_NOFILE, 256)
    if _LINUX:
        # macOS refuses the first, and cannot tell what the second needs.
        _limit(resource.RLIMIT_AS, memory_bytes)
        if os.getuid() != 0:
            _limit(resource.RLIMIT_NPROC, _threads_of_user(os.getuid()) + _MORE_PROCESSES)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _threads_of_user(uid: int) -> int:
    """Count the threads of a user's processes: what RLIMIT_NPROC is compared with."""
    count = 0
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _prctl(option: int, value: int) -> None:
    if _LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
