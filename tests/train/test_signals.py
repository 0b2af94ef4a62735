"""The first signal asks for a stop, the second acts as it always does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config

from grpo_cli.launch.failures import STOP_SIGNALS
from grpo_cli.train.signals import StopRequest, compile_in_this_process


@pytest.fixture(autouse=True)
def received() -> Iterator[list[int]]:
    """Signals that reach the handlers of before, which stand in for those that would end the process."""
    numbers: list[int] = []
    before = {number: signal.signal(number, lambda n, _: numbers.append(n)) for number in STOP_SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time in a worker, in seconds, as its attribute `now`."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("grpo_cli.train.signals.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_only_sets_the_name_and_the_second_acts(
    number: signal.Signals, received: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with StopRequest() as request:
        assert request.name is None
        os.kill(os.getpid(), number)
        assert request.name == number.name
        assert received == []
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert f"{number.name}: stopping after this step, with a checkpoint" in message
        os.kill(os.getpid(), number)
        assert received == [number]
        assert request.name == number.name


def test_after_the_first_signal_another_kind_acts_too(received: list[int]) -> None:
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.name == "SIGUSR1"
        assert received == [signal.SIGINT]


def test_in_a_worker_the_echo_of_a_signal_is_not_a_second_one(clock: SimpleNamespace, received: list[int]) -> None:
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        clock.now += 1.9
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (request.name, received) == ("SIGUSR1", [])
        clock.now += 0.2
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received == [signal.SIGUSR1]


def test_in_a_worker_another_signal_is_a_second_one_at_once(clock: SimpleNamespace, received: list[int]) -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]


def test_only_the_first_worker_announces_the_stop(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.name == "SIGUSR1"
    assert capsys.readouterr().err == ""


def test_the_handlers_of_before_come_back_even_after_an_error() -> None:
    before = handlers()
    with StopRequest():
        assert handlers() != before
    assert handlers() == before
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert handlers() == before


def test_one_request_can_follow_another(received: list[int]) -> None:
    for _ in range(2):
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.name == "SIGTERM"
    assert received == []


def test_outside_the_main_thread_no_handler_is_touched() -> None:
    before = handlers()
    seen: list[Any] = []

    def enter() -> None:
        with StopRequest() as request:
            seen.extend([request.name, handlers() == before])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None, True]


COMPILES_AFTER_A_SIGNAL = """
import os, signal, sys, time
import psutil, torch
from torch._inductor.async_compile import AsyncCompile
from grpo_cli.train.signals import StopRequest, compile_in_this_process

compile_in_this_process()
with StopRequest() as request:
    torch.compile(lambda x: x.sin() + 1)(torch.ones(9))
    AsyncCompile.wakeup()  # as every compilation for a GPU does
    print([child.cmdline() for child in psutil.Process().children()])
    os.killpg(0, signal.SIGUSR1)
    while request.name is None:
        time.sleep(0.01)
    time.sleep(0.5)
    AsyncCompile.use_process_pool()  # raises where the process beside this one is gone
    assert torch.compile(lambda x: x.cos() * 2)(torch.zeros(9)).tolist() == [2.0] * 9
    print(request.name)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_is_compiled_after_a_signal_to_the_whole_group_still_is(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_COMPILE_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES_AFTER_A_SIGNAL],
        env=environment | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        process_group=0, text=True, capture_output=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "SIGUSR1"], "no process beside it, and the request is seen"


def test_how_many_compile_stays_the_user_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not pytest's setattr, which ends with delattr here: the setting would be gone for all later tests.
    with torch._inductor.config.patch(compile_threads=7):
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
        compile_in_this_process()
        assert torch._inductor.config.compile_threads == 7
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
        compile_in_this_process()
        assert torch._inductor.config.compile_threads == 1
