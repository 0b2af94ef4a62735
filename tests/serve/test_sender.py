"""A worker that waits for a trainer notices within seconds that it has gone, and not before."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from grpo_cli.serve.sender import KEEP_ALIVE, Sender, SenderGone
from tests.processes import ROOT

NOTICED_S = KEEP_ALIVE["TCP_KEEPIDLE"] + KEEP_ALIVE["TCP_KEEPINTVL"] * KEEP_ALIVE["TCP_KEEPCNT"]

LISTENS = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
time.sleep(120)
"""


def listen(host: str, *within: str) -> tuple[subprocess.Popen[str], int]:
    """A process that listens, as one that hosts a store does, and its port."""
    process = subprocess.Popen([*within, sys.executable, "-c", LISTENS, host], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.fixture
def trainer() -> Iterator[tuple[subprocess.Popen[str], int]]:
    process, port = listen("127.0.0.1")
    yield process, port
    process.kill()
    process.wait()


def fail() -> None:
    raise TimeoutError("of the call itself")


def test_what_the_call_gives_or_raises_is_passed_on(trainer: tuple[subprocess.Popen[str], int]) -> None:
    sender = Sender("127.0.0.1", trainer[1], 5)
    assert sender.while_there(lambda: 7) == 7
    with pytest.raises(TimeoutError, match="of the call itself"):
        sender.while_there(fail)
    sender.close()


@pytest.mark.slow
def test_a_trainer_that_is_stopped_is_waited_for_and_one_that_is_killed_is_not(
    trainer: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = trainer
    sender, never = Sender("127.0.0.1", port, 5), threading.Event()
    process.send_signal(signal.SIGSTOP)
    assert sender.while_there(lambda: never.wait(NOTICED_S + 3)) is False, "it was waited for"
    threading.Timer(1.0, process.kill).start()
    began = time.monotonic()
    with pytest.raises(SenderGone, match=rf"the trainer at 127.0.0.1:{port} has gone"):
        sender.while_there(lambda: never.wait(60))
    assert time.monotonic() - began < 30, "before the call's own end"
    never.set()


def test_nobody_there_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        Sender("127.0.0.1", port, 5)


WAITS = """
import sys, threading
from grpo_cli.serve.sender import Sender, SenderGone
sender = Sender("10.79.1.1", int(sys.argv[1]), 5)
print("connected", flush=True)
try:
    sender.while_there(lambda: threading.Event().wait(60))
except SenderGone as error:
    print(error)
"""


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two network namespaces with a cable between them: interface wire0, addresses 10.79.1.1 and 2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root")
    names = [f"grpo-sender-{os.getpid()}-{index}" for index in range(2)]
    cable = ["link", "add", "wire0", "type", "veth", "peer", "name", "wire0", "netns", names[1]]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        subprocess.run(["ip", "-n", names[0], *cable], check=True, capture_output=True)
        for index, name in enumerate(names, start=1):
            for words in (["addr", "add", f"10.79.1.{index}/24", "dev", "wire0"], ["link", "set", "wire0", "up"]):
                subprocess.run(["ip", "-n", name, *words], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_a_machine_that_vanishes_without_a_word_is_noticed(machines: list[str]) -> None:
    trainer, port = listen("10.79.1.1", "ip", "netns", "exec", machines[0])
    worker = subprocess.Popen(
        ["ip", "netns", "exec", machines[1], sys.executable, "-c", WAITS, str(port)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "connected\n"
        subprocess.run(["ip", "-n", machines[0], "link", "set", "wire0", "down"], check=True)
        output, _ = worker.communicate(timeout=NOTICED_S + 30)
        assert output == f"the trainer at 10.79.1.1:{port} has gone in the middle of it\n"
    finally:
        for process in (trainer, worker):
            process.kill()
            process.wait()
