"""A server of the trainer's own lives as long as the trainer, no longer, and its end is explained."""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoConfig, AutoTokenizer

from grpo_cli.errors import RunError, ServerLost, UserError
from grpo_cli.recipe.schema import ServerConfig
from grpo_cli.rollout.server import spawned_server
from grpo_cli.rollout.server.spawned_server import MAX_STARTS, SpawnedServer, free_port, server_devices
from grpo_cli.serve import engine_arguments
from grpo_cli.serve.lock import read_key
from tests.conftest import byte_tokenizer, tiny_llama

PATIENCE_S = 20.0

ENDS = "import sys; print('loading'); print('grpo serve: no such model'); print('bye'); sys.exit(3)"
"""Ends as it is started."""

STAYS = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("pids", os.getpid(), child.pid, flush=True)
sys.stdin.read()
"""
"""Ends with its standard input, as `--stop-with-stdin` does, and leaves its engine behind."""

HANGS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("pids", os.getpid(), flush=True)
time.sleep(60)
"""
"""Hears neither."""


@pytest.fixture
def spawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SpawnedServer]]:
    monkeypatch.setattr(spawned_server, "LINGER_S", 0.3)  # these stand-ins for an engine never notice
    servers: list[SpawnedServer] = []

    def make(script: str | None = None, arguments: Any = None, **config: Any) -> SpawnedServer:
        log = tmp_path / "run" / "server.log"
        server = SpawnedServer(
            tiny_llama(), byte_tokenizer(), ServerConfig(spawn=True, **config), arguments or {}, log
        )
        if script is not None:
            server._command = [sys.executable, "-c", script]
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


def pids(log: Path) -> list[int]:
    """Of the server and its children, once they run."""
    lines = wait_for(lambda: [line for line in log.read_text().split("\n")[:-1] if line.startswith("pids")])
    return [int(word) for word in lines[-1].split()[1:]]


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for_end(server: SpawnedServer) -> None:
    assert server._process is not None
    server._process.wait(PATIENCE_S)


def test_a_free_port_can_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", free_port())):
        pass


@pytest.mark.parametrize(
    ("count", "wanted", "visible", "training", "expected"),
    [
        (0, 1, None, [0], None),
        (1, 1, None, [0], None),
        (2, 1, None, [0], "1"),
        (2, 1, None, [1], "0"),
        (8, 2, None, [0], "6,7"),
        (8, 2, "", [0], "6,7"),
        (8, 2, None, [7], "5,6"),
        (8, 2, None, range(6), "6,7"),
        (8, 2, None, range(7), None),
        (3, 2, "4,6,7", [0], "6,7"),
        (3, 2, "4,6,7", [1], "4,7"),
        (2, 1, "GPU-a,GPU-b", [0], "GPU-b"),
        (2, 2, "4,6", [0], None),
    ],
)
def test_the_server_gets_the_last_gpus_that_nobody_trains_on_where_there_are_enough(
    count: int, wanted: int, visible: str | None, training: Any, expected: str | None
) -> None:
    assert server_devices(count, wanted, visible, training) == expected


def test_the_command_serves_the_policy_s_configuration_behind_a_key(spawn: Any) -> None:
    server = spawn(arguments={"max_model_len": 99}, port=8123, tensor_parallel_size=2)
    command = server._command
    assert command[:4] == [sys.executable, "-m", "grpo_cli.cli", "serve"]
    options = dict(zip(command[4::2], command[5::2], strict=False))
    assert options["--load-format"] == "dummy", "the weights come from the policy"
    assert (options["--port"], server.url) == ("8123", "http://127.0.0.1:8123")
    assert options["--tp"] == "2"
    assert "--host" not in command, "this machine's own address is the default"
    assert command[command.index("--stop-with-stdin") + 1 :] == ["--max-model-len", "99"]
    assert AutoConfig.from_pretrained(options["--model"]).hidden_size == 32
    assert AutoTokenizer.from_pretrained(options["--model"]).eos_token == "<|end|>"
    assert not list(Path(options["--model"]).glob("*.safetensors"))
    assert read_key(options["--api-key-file"]) == server.key
    assert server.key not in " ".join(command)


def test_an_argument_that_splits_prompts_is_refused_by_its_key(
    spawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_arguments, "is_cpu_build", lambda: True)
    with pytest.raises(UserError, match=r"^generation\.vllm\.enable_chunked_prefill: "):
        spawn(arguments={"enable-chunked-prefill": True})


def test_the_model_is_for_the_user_alone_and_gone_afterwards(spawn: Any) -> None:
    server = spawn(STAYS)
    server.ensure_running()
    folder = server._folder.path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    server.stop()
    assert not folder.exists()
    server.stop()


READS_KEY = """
import os, sys
from grpo_cli.serve.lock import read_key
key = read_key(sys.argv[1])
if len(sys.argv) == 2:  # as `grpo serve` starts itself again with the right environment
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "again"])
print("read", len(key), flush=True)
"""


def test_the_key_is_in_no_file_and_every_start_can_read_it(spawn: Any) -> None:
    server = spawn()
    named = server._command[server._command.index("--api-key-file") + 1]
    files = [path for path in server._folder.path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if server.key.encode() in path.read_bytes()]
    server._command = [sys.executable, "-c", READS_KEY, named]
    for count in (1, 2):
        server.ensure_running()
        wait_for_end(server)
        assert server.log.read_text().count(f"read {len(server.key)}") == count, server.log.read_text()


def test_what_a_killed_trainer_left_goes_when_the_next_starts(
    spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    trainer = os.fork()
    if not trainer:
        spawn()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(trainer, 0)[1])
    (left,) = tmp_path.glob("grpo-train-*")
    server = spawn()
    assert list(tmp_path.glob("grpo-train-*")) == [server._folder.path] != [left]


def test_two_servers_have_keys_and_folders_of_their_own(spawn: Any) -> None:
    first, second = spawn(), spawn()
    assert first.key != second.key
    assert first._folder.path != second._folder.path


def test_a_server_that_runs_is_not_started_again(spawn: Any) -> None:
    server = spawn(STAYS)
    for _ in range(3):
        server.ensure_running()
        server.check()
    (parent, _) = pids(server.log)
    assert parent == server._process.pid
    assert server.log.read_text().count("pids") == 1


@pytest.mark.parametrize("script", [STAYS, HANGS], ids=["hears", "deaf"])
def test_stopping_ends_the_server_and_what_it_started(
    spawn: Any, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawned_server, "STOP_TIMEOUT_S", PATIENCE_S if script is STAYS else 0.05)
    server = spawn(script)
    server.ensure_running()
    family = pids(server.log)
    assert all(map(is_running, family))
    server.stop()
    for pid in family:
        wait_for(lambda pid=pid: not is_running(pid))


def test_a_server_is_asked_to_end_before_it_is_made_to(spawn: Any) -> None:
    server = spawn(
        "import sys, signal; signal.signal(signal.SIGTERM, lambda *_: None); print('pids 1', flush=True); "
        "sys.stdin.read(); print('said goodbye', flush=True)"
    )
    server.ensure_running()
    pids(server.log)
    server.stop()
    assert "said goodbye" in server.log.read_text()


def test_a_server_ends_when_the_trainer_is_killed(spawn: Any) -> None:
    server = spawn(STAYS)
    trainer = os.fork()
    if not trainer:
        server.ensure_running()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(trainer, 0)[1])
    wait_for(server.log.exists)
    parent, engine = pids(server.log)
    wait_for(lambda: not is_running(parent))
    if is_running(engine):  # here it is a stand-in without `stop_with_server`
        os.kill(engine, signal.SIGKILL)


def test_a_signal_from_the_terminal_does_not_reach_the_server(spawn: Any) -> None:
    """Ctrl-C asks the trainer for a checkpoint; the server must finish the step."""
    server = spawn(STAYS)
    server.ensure_running()
    parent, _ = pids(server.log)
    assert os.getpgid(parent) != os.getpgid(0)
    assert os.getsid(parent) != os.getsid(0)


def test_a_server_that_ended_is_started_again_so_often_and_no_more(spawn: Any) -> None:
    server = spawn(ENDS)
    for count in range(1, MAX_STARTS + 1):
        server.ensure_running()
        wait_for_end(server)
        assert server.log.read_text().count("loading") == count, "the log goes on"
    with pytest.raises(ServerLost, match=rf"ended {MAX_STARTS} times in a row; its log is {server.log}") as caught:
        server.ensure_running()
    assert "no such model" in str(caught.value)
    assert server.log.read_text().count("loading") == MAX_STARTS


def test_a_server_that_has_generated_may_end_as_often_again(spawn: Any) -> None:
    server = spawn(ENDS)
    for _ in range(MAX_STARTS):
        server.ensure_running()
        wait_for_end(server)
        server.has_generated()
    for _ in range(MAX_STARTS):
        server.ensure_running()
        wait_for_end(server)
    with pytest.raises(ServerLost):
        server.ensure_running()


def test_what_an_ended_server_left_running_goes_before_the_next_starts(spawn: Any) -> None:
    server = spawn(STAYS)
    server.ensure_running()
    parent, engine = pids(server.log)
    os.kill(parent, signal.SIGKILL)
    wait_for_end(server)
    assert is_running(engine)
    server.ensure_running()
    wait_for(lambda: not is_running(engine))
    wait_for(lambda: server.log.read_text().count("pids") == 2)
    assert is_running(pids(server.log)[0])


def test_an_end_is_told_with_the_lines_that_explain_it(spawn: Any) -> None:
    server = spawn(ENDS)
    server.check()
    server.ensure_running()
    wait_for_end(server)
    with pytest.raises(RunError) as caught:
        server.check()
    assert str(caught.value) == (
        f"the rollout server ended with code 3; its log is {server.log}\ngrpo serve: no such model"
    )


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("".join(f"line {i}\n" for i in range(9)), "line 4\nline 5\nline 6\nline 7\nline 8"),
        ("a\nValueError: x\nb\n", "ValueError: x"),
        ("".join(f"Error {i}\n" for i in range(9)), "Error 4\nError 5\nError 6\nError 7\nError 8"),
        ("", ""),
    ],
)
def test_the_last_telling_lines_are_shown_or_else_the_last_lines(spawn: Any, log: str, expected: str) -> None:
    server = spawn()
    assert server._last_lines() == "", "without a log there are none"
    server.log.parent.mkdir()
    server.log.write_text(log)
    assert server._last_lines() == expected


def test_a_stopped_server_is_not_started_again(spawn: Any) -> None:
    """By a thread that was waiting for its answer."""
    server = spawn(STAYS)
    server.ensure_running()
    server.stop()
    server.has_generated()
    with pytest.raises(RunError, match="was stopped"):
        server.ensure_running()
    assert not server._folder.path.exists()


def test_the_key_is_in_no_environment(spawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    server = spawn(ENDS)
    monkeypatch.setattr(spawned_server.subprocess, "Popen", lambda *args, **kwargs: given.update(kwargs))
    server.ensure_running()
    assert server.key not in " ".join(given["env"].values())
    assert given["env"]["VLLM_NO_USAGE_STATS"] == "1"
    server._process = None
