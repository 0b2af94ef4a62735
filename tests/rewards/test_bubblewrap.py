"""What code that means harm cannot do where bubblewrap works."""

import os
import socket
import time
from pathlib import Path

import pytest

from rewards.bubblewrap import bubblewrap
from rewards.sandbox import run_python, run_tests

HOW = bubblewrap()
pytestmark = pytest.mark.skipif(isinstance(HOW, str), reason=str(HOW))


def eventually(condition, seconds=3.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def anyone_in(namespace):
    """Whether a process is in that namespace of processes."""
    for link in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            if os.readlink(link) == namespace:
                return True
        except OSError:
            continue
    return False


def test_what_is_no_attack_works():
    source = """
import json, subprocess, sys, tempfile, threading, multiprocessing, sqlite3
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("kept")
assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout == b"1\\n"
thread = threading.Thread(target=print, args=("from a thread",))
thread.start()
thread.join()
multiprocessing.Lock()
import numpy
print(numpy.arange(3).sum())
"""
    result = run_python(source)
    assert result.passed, result.output
    assert result.output == "from a thread\n3\n"


def test_ends_are_told_as_without_it():
    assert run_python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").exit_code == -11
    assert run_python("raise SystemExit(3)").exit_code == 3
    result = run_python("while True: pass", timeout_s=0.5)
    assert (result.timed_out, result.exit_code) == (True, -9)
    assert "MemoryError" in run_python("x = bytes(1 << 30)").output


def test_a_fork_bomb_ends_with_its_time():
    source = """
import os
print(os.readlink("/proc/self/ns/pid"), flush=True)
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
    start = time.monotonic()
    result = run_python(source, timeout_s=1.0)
    assert time.monotonic() - start < 10
    assert not result.passed
    assert eventually(lambda: not anyone_in(result.output.split("\n")[0]), seconds=10)


def test_infinite_output_is_bounded():
    source = "import sys\nwhile True:\n    print('x' * 1000)\n    print('y' * 1000, file=sys.stderr)"
    start = time.monotonic()
    result = run_python(source, timeout_s=0.5, output_bytes=10_000)
    assert result.timed_out
    assert len(result.output) == 10_000
    # Also where it is the program that prints, and its tests that end.
    source = "import threading\nthreading.Thread(target=lambda: [print('x' * 1000) for _ in iter(int, 1)]).start()"
    result = run_tests(source, ["pass"])
    assert result.passed
    assert len(result.output) <= 65536
    assert time.monotonic() - start < 8


def test_nothing_outside_can_be_written(tmp_path):
    paths = [
        "/",
        "/usr",
        "/etc",
        "/dev",
        "/proc/sys/kernel",
        "/sandbox",
        os.path.dirname(os.__file__),
        str(tmp_path),
    ]
    source = f"""
import os, sys
for folder in {paths} + [sys.prefix]:
    for attempt in (lambda: open(folder + "/attack", "w"), lambda: os.mkdir(folder + "/attack")):
        try:
            attempt()
            print("wrote into", folder)
        except OSError:
            pass
for path in ("/sandbox/rewards/sandbox_child.py", os.__file__):
    try:
        open(path, "a")
        print("opened", path)
    except OSError:
        pass
print("done")
"""
    assert run_python(source).output == "done\n"
    assert list(tmp_path.iterdir()) == []


def test_no_server_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0grpo-test-{os.getpid()}")
        local.listen()
        source = f"""
import socket
for family, address in ((socket.AF_INET, {server.getsockname()}), (socket.AF_UNIX, {local.getsockname()!r}),
                        (socket.AF_INET, ("1.1.1.1", 53))):
    with socket.socket(family) as client:
        client.settimeout(1.0)
        try:
            client.connect(address)
            print("connected", address)
        except OSError:
            pass
print(socket.if_nameindex())
"""
        assert run_python(source).output == "[(1, 'lo')]\n"
        for listening in (server, local):
            listening.settimeout(0.1)
            with pytest.raises(TimeoutError):
                listening.accept()


def test_the_environment_and_memory_of_the_trainer_cannot_be_read(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    source = """
import glob, os
pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
assert len(pids) <= 4, pids
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        print(open(path).read())
    except OSError:
        pass
for name in ("mem", "fd/0"):
    try:
        open(f"/proc/{os.getppid()}/{name}", "rb").read(1)
        print("read the supervisor's", name)
    except OSError:
        pass
print(dict(os.environ))
"""
    result = run_python(source)
    assert result.passed, result.output
    assert "hf_secret" not in result.output
    assert "read the supervisor" not in result.output


def test_key_files_homes_and_accounts_cannot_be_read(tmp_path):
    key = tmp_path / "key"
    key.write_text("the-api-key")
    os.chmod(key, 0o644)
    paths = [str(key), f"/proc/1/root{key}", "/etc/passwd", "/etc/shadow", "/etc/hosts", "/root/.ssh", __file__]
    source = f"""
import os
for path in {paths}:
    os.symlink(path, "link")
    for name in (path, "link"):
        try:
            print(path, os.listdir(name) if os.path.isdir(name) else open(name).read())
        except OSError:
            pass
    os.unlink("link")
print(sorted(os.listdir("/home")) if os.path.exists("/home") else [])
"""
    result = run_python(source)
    assert result.passed, result.output
    assert result.output == "[]\n"


def test_a_daemon_does_not_outlive_the_program():
    source = """
import os, time
print(os.readlink("/proc/self/ns/pid"), flush=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(3):
            os.close(descriptor)
        time.sleep(60)
    os._exit(0)
"""
    result = run_python(source)
    assert result.passed
    assert eventually(lambda: not anyone_in(result.output.strip()))


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="calls are filtered on these only")
def test_the_program_becomes_root_in_no_namespace_of_its_own():
    source = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
new_user, clone = 0x10000000, {"x86_64": 56, "aarch64": 220}[os.uname().machine]
for call in (
    lambda: libc.unshare(new_user),
    lambda: libc.syscall(clone, new_user | signal.SIGCHLD, 0, 0, 0, 0),
    lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
):
    if call() == 0:
        os._exit(5)
    print(ctypes.get_errno(), end=" ")
    ctypes.set_errno(0)
"""
    result = run_python(source)
    assert result.passed
    assert result.output == "1 1 1 "


def test_the_disk_cannot_be_filled():
    source = """
total = 0
for folder in ("/tmp", "/dev/shm"):
    try:
        for n in range(100):
            with open(f"{folder}/{n}", "wb") as file:
                for _ in range(15):
                    total += file.write(bytes(1 << 20))
    except OSError as error:
        print(error.strerror)
print(total >> 20)
"""
    result = run_python(source)
    first, second, total = result.output.split()[0:1] + result.output.split("\n")[1:3]
    assert first == "No"
    assert second == "No space left on device"
    assert int(total) <= 80


@pytest.mark.parametrize("target", ["1", "os.getppid()", "-1"])
def test_killing_parents_ends_only_the_program(target):
    source = f"""
import os, signal, time
print(os.readlink("/proc/self/ns/pid"), flush=True)
os.kill({target}, signal.SIGKILL)
time.sleep(60)
"""
    result = run_python(source, timeout_s=1.0)
    assert not result.passed
    assert eventually(lambda: not anyone_in(result.output.strip()))


def test_the_program_cannot_see_its_tests():
    source = """
import os, sys
seen = [name for name in os.listdir("/proc") if name.isdigit()]
def look():
    found = []
    for pid in seen:
        for name in ("mem", "environ", "cmdline", "fd/0"):
            try:
                found.append(b"the-expected-answer" in open(f"/proc/{pid}/{name}", "rb").read(1 << 16))
            except OSError:
                pass
    return any(found), len(seen)
"""
    result = run_tests(
        source, ["found, count = look()", "assert not found, 'the-expected-answer'\nassert count <= 4"]
    )
    assert result.passed, result.output
