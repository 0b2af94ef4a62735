"""The half of `rewards.sandbox` that runs inside the child process. Started as a script; never import it.

It forks. The parent stays behind as the supervisor, which keeps the time and kills what is left; the child
limits itself and becomes the program, or the tests of a program that runs in another such process. Standard
library only, and little of it: it starts once or twice per completion.

Both report over one pipe, each line behind a token that `rewards.sandbox` made for this run: "started",
"finished" (the last line of the source ran), "timed out" and "exit N".
"""

import ast
import builtins
import ctypes
import errno
import importlib
import json
import os
import resource
import signal
import struct
import sys
import time
from contextlib import suppress
from types import CodeType, FrameType, ModuleType
from typing import Any

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_MORE_PROCESSES = 64
_READY = b"ready\n"


def main() -> None:
    # The trainer's own choices are inherited, and would keep the supervisor from hearing of time and death.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A scheduler sends it to every process of a job; it is for the trainer.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    job = json.load(sys.stdin)
    # Here the job, with the token in it, could be read again by whoever finds this process.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if job["uid"] is not None:
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])
    if job["wrapped"]:
        _refuse_namespaces()
    prefix = job["token"] + " "
    os.write(report, f"{prefix}started\n".encode())
    connection = job["connection"]
    if connection is not None:
        os.set_inheritable(connection, False)
    if job["role"] == "program":
        os.write(connection, _READY)
    if job["role"] == "tests" and os.read(connection, len(_READY)) != _READY:
        sys.exit("the program did not start")

    # Orphans then become children of this process, wherever they hide, and can be killed.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    program = os.fork()
    if program:
        _prctl(_PR_SET_DUMPABLE, 0)
        if connection is not None:
            os.close(connection)
        _supervise(program, job["timeout_s"], prefix, report)

    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Nobody reads the memory of the tests. A program may look at itself.
    _prctl(_PR_SET_DUMPABLE, int(job["role"] != "tests"))
    _set_limits(job["memory_bytes"], job["cpu_s"], job["other_threads"])
    sys.argv = ["solution.py"]

    # Compiled before anything runs: no part can change what a later one says.
    sources, role = job["parts"], job["role"]
    parts = [compile(part, f"part{n}.py", "exec", dont_inherit=True) for n, part in enumerate(sources)]
    del job
    if role == "program":
        os.close(report)
        _serve(parts, connection)
    elif role == "tests":
        _test(parts, _names_in(sources), connection)
    else:
        _run(parts)
    os.write(report, f"{prefix}finished\n".encode())


def _run(parts: list[CodeType]) -> dict[str, Any]:
    # A module of its own that is registered: dataclasses and pickle look names up there.
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    for part in parts:
        exec(part, module.__dict__)
    return module.__dict__


def _serve(parts: list[CodeType], connection: int) -> None:
    """Run a program, then do what its tests ask."""
    crossing = _crossing()
    names = _run(parts)
    operations = {**crossing.PROGRAM_OPERATIONS, "names": lambda: _offered(names), "global": names.__getitem__}
    sys.stdout.flush()
    crossing.Peer(connection, operations, lends_everything=True).serve()


def _offered(names: dict[str, Any]) -> dict[str, str | None]:
    """What a program defines; for a module that it imported, that module's name."""
    return {
        name: value.__name__ if isinstance(value, ModuleType) else None
        for name, value in names.items()
        if not name.startswith("__")
    }


def _test(parts: list[CodeType], used: set[str], connection: int) -> None:
    """Run tests, whose names are their own, the built-in ones, and the program's."""
    crossing = _crossing()
    peer = crossing.Peer(connection, crossing.TEST_OPERATIONS, lends_everything=False)
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    namespace = _TestNames(peer, used)
    namespace.update(module.__dict__)
    for part in parts:
        exec(part, namespace)


class _TestNames(dict[str, Any]):
    """The global names of tests. Those that they do not define are looked up in the program, each time anew."""

    def __init__(self, peer: Any, used: set[str]) -> None:
        super().__init__()
        self._peer = peer
        offered = peer.ask("names")
        self._offered: dict[str, str | None] = offered if isinstance(offered, dict) else {}
        about = [name for name in used if name in self._offered and self._offered[name] is None]
        # A program that defines `all` must not replace it in `assert all(add(n, 0) == n for n in numbers)`. But
        # where `sum` is the only name of the program that the tests use, it is what they are about.
        self._hidden = set(vars(builtins)) - (set(about) if len(about) == 1 else set())

    def __missing__(self, name: str) -> Any:
        if name not in self._offered or name in self._hidden:
            raise KeyError(name)
        module = self._offered[name]
        if module is None:
            return self._peer.ask("global", name)
        # Not the program's: its `math.isclose` could say yes to everything.
        self[name] = importlib.import_module(module)
        return self[name]


def _names_in(sources: list[str]) -> set[str]:
    return {node.id for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def _crossing() -> ModuleType:
    # Its folder is not left on the path: what else is there is not for the program.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from rewards import sandbox_crossing

    del sys.path[0]
    return sandbox_crossing


def _supervise(program: int, timeout_s: float, prefix: str, report: int) -> None:
    """Wait for the program, kill it when its time is over, kill what it leaves, and tell how it ended."""

    def time_is_over(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGALRM:
            os.write(report, f"{prefix}timed out\n".encode())
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
    os.write(report, f"{prefix}exit {os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


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


def _set_limits(memory_bytes: int, cpu_s: int, other_threads: int) -> None:
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, cpu_s)
    _limit(resource.RLIMIT_FSIZE, 16 * 1024 * 1024)
    _limit(resource.RLIMIT_NOFILE, 256)
    if _LINUX:
        # macOS refuses the first, and cannot tell what the second needs.
        _limit(resource.RLIMIT_AS, memory_bytes)
        if os.getuid() != 0:
            _limit(resource.RLIMIT_NPROC, other_threads + _MORE_PROCESSES)


def _refuse_namespaces() -> None:
    """Let this process and its children be root in no namespace of their own, where they could mount more memory.

    A filter of system calls, as far as this machine's are known here: no `unshare`, no `clone` with a new user
    namespace, and no `clone3`, whose flags a filter cannot see (the C library then uses `clone`).
    """
    numbers = {"x86_64": (0xC000003E, 272, 56), "aarch64": (0xC00000B7, 97, 220)}
    if os.uname().machine not in numbers:
        return
    architecture, unshare, clone = numbers[os.uname().machine]
    load, equal, at_least, has_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, not_permitted, not_there = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 0, 8, architecture),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 6, 0, 0x40000000),  # another set of numbers
        (equal, 5, 0, unshare),
        (equal, 5, 0, 435),  # clone3
        (equal, 0, 2, clone),
        (load, 0, 0, 16),  # the first argument
        (has_bit, 1, 0, 0x10000000),  # CLONE_NEWUSER
        (answer, 0, 0, allow),
        (answer, 0, 0, not_permitted),
        (answer, 0, 0, not_there),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    filter_ = ctypes.create_string_buffer(struct.pack("HL", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_PR_SET_SECCOMP, 2, filter_, 0, 0) != 0 and ctypes.get_errno() != errno.EINVAL:
        sys.exit("no filter of system calls could be set")


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _prctl(option: int, value: int) -> None:
    if _LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
