"""Which of several failed workers is the cause, and what the user sees of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_cli.distributed.environment import Nodes
from grpo_cli.errors import RunError, StoppedEarly, UserError
from grpo_cli.launch.failures import STOP_SIGNALS, exit_code, is_consequence, raise_outcome, report, root_cause


@pytest.fixture
def handlers() -> Iterator[None]:
    """`report` is for a process that ends, and leaves signals ignored."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def told(error: BaseException, at: float, path: Path) -> Any:
    """The failure that torch's agent makes of what a worker reported."""
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        patch.setattr("time.time", lambda: at)
        report(error, exit_code(error))
    return ProcessFailure(local_rank=0, pid=77, exitcode=exit_code(error), error_file=str(path))


def killed(number: int, at: float) -> Any:
    return SimpleNamespace(
        exitcode=-number, pid=77, timestamp=at, message="", signal_name=lambda: signal.Signals(number).name
    )


LOST = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2442")


@pytest.mark.usefixtures("handlers")
def test_the_cause_is_not_a_rank_that_lost_contact_or_was_stopped(tmp_path: Path) -> None:
    lost, bug = told(LOST, 100.0, tmp_path / "0"), told(ValueError("bug"), 100.5, tmp_path / "1")
    later_bug = told(ValueError("another"), 100.7, tmp_path / "2")
    stopped, stopped_hard = killed(signal.SIGTERM, 100), killed(signal.SIGKILL, 130)
    assert root_cause({0: lost, 1: bug, 2: later_bug, 3: stopped, 4: stopped_hard})[0] == 1
    assert root_cause({0: lost, 1: killed(signal.SIGKILL, 101), 2: stopped})[0] == 1
    assert root_cause({0: lost, 1: stopped})[0] == 0
    assert root_cause({0: killed(signal.SIGABRT, 100), 1: bug})[0] == 1
    assert root_cause({0: lost, 1: killed(signal.SIGABRT, 101)})[0] == 1


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("error", [UserError("wrong\nin two lines"), RunError("failed"), StoppedEarly("stopped")])
def test_an_expected_error_comes_back_as_it_was(tmp_path: Path, error: Exception) -> None:
    failure = told(error, 100.0, tmp_path / "0")
    with pytest.raises(type(error)) as caught:
        raise_outcome({3: failure}, Nodes(), ())
    assert str(caught.value) == str(error)


@pytest.mark.usefixtures("handlers")
def test_only_the_first_node_tells_of_an_early_stop(tmp_path: Path) -> None:
    failure = told(StoppedEarly("stopped"), 100.0, tmp_path / "0")
    with pytest.raises(SystemExit) as caught:
        raise_outcome({3: failure}, Nodes(2, 1, "node1", 29500), ())
    assert caught.value.code == 75


@pytest.mark.usefixtures("handlers")
def test_a_bug_is_one_line_with_its_rank(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^rank 2 \(.+, pid 77\) failed: ValueError: two lines$"):
        raise_outcome({2: told(ValueError("two\nlines"), 100.0, tmp_path / "0")}, Nodes(), ())


@pytest.mark.usefixtures("handlers")
def test_where_all_lost_contact_the_traceback_is_shown_and_the_other_nodes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="lost another process, and other nodes may tell why"):
        raise_outcome({2: told(LOST, 100.0, tmp_path / "0")}, Nodes(2, 1, "node1", 29500), ())
    assert "pair.cc:547" in capsys.readouterr().err


def test_a_kill_names_the_signal_and_for_sigkill_what_sends_it() -> None:
    with pytest.raises(RunError, match=r"rank 2 .* was killed by SIGKILL; .*out of memory"):
        raise_outcome({2: killed(signal.SIGKILL, 100)}, Nodes(), ())
    with pytest.raises(RunError, match=r"rank 2 .* was killed by SIGSEGV$"):
        raise_outcome({2: killed(signal.SIGSEGV, 100)}, Nodes(), ())


def test_workers_that_a_forwarded_signal_killed_were_stopped() -> None:
    with pytest.raises(RunError, match="stopped at once by SIGTERM"):
        raise_outcome({0: killed(signal.SIGTERM, 100), 1: killed(signal.SIGTERM, 100)}, Nodes(), {signal.SIGTERM})


def test_errors_out_of_a_collective_are_consequences() -> None:
    assert is_consequence(LOST)
    assert is_consequence(RuntimeError("NCCL error: remote process exited or there was a network error"))
    assert not is_consequence(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_consequence(ConnectionResetError("Connection reset by peer"))  # of a server, not of a rank
    assert not is_consequence(RunError("the server: Connection reset by peer"))


def test_an_error_raised_inside_torch_distributed_is_a_consequence_whatever_it_says() -> None:
    source = "raise RuntimeError('wait timeout after 600000ms')"
    with pytest.raises(RuntimeError) as caught:
        exec(compile(source, "/site-packages/torch/distributed/distributed_c10d.py", "exec"))
    assert is_consequence(caught.value)


@pytest.mark.usefixtures("handlers")
def test_a_report_is_whole_and_later_signals_do_not_change_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    report(StoppedEarly("stopped"), 75)
    assert json.loads(path.read_text())["message"]["errorCode"] == 75
    assert [entry.name for entry in tmp_path.iterdir()] == ["error.json"]
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in STOP_SIGNALS)
