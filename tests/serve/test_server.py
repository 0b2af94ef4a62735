"""The command line of `grpo serve`: what vLLM is told, and which key a server asks for."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_cli.errors import UserError
from grpo_cli.serve import engine_arguments, server
from grpo_cli.serve.server import (
    OWN_OPTIONS,
    ServeOptions,
    find_key,
    notice_vanished_clients,
    parse,
    serve,
    vllm_arguments,
)

KEY = "correct-horse-battery-staple"
LOCAL = ServeOptions(model="folder", host="127.0.0.1", port=8000, api_key_file=None)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setattr(engine_arguments, "is_cpu_build", lambda: request.param == "cpu")
    return str(request.param)


on_cpu = pytest.mark.parametrize("build", ["cpu"], indirect=True)
on_gpu = pytest.mark.parametrize("build", ["cuda"], indirect=True)


def pairs(arguments: list[str]) -> dict[str, str]:
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


@on_gpu
def test_options_are_told_to_vllm_in_its_words(build: str) -> None:
    options = replace(LOCAL, tp=2, dp=3, dtype="bfloat16", max_model_len=99, gpu_memory_utilization=0.5)
    assert pairs(vllm_arguments(options)) == {
        "--model": "folder", "--host": "127.0.0.1", "--port": "8000", "--tensor-parallel-size": "2",
        "--data-parallel-size": "3", "--dtype": "bfloat16", "--max-model-len": "99",
        "--gpu-memory-utilization": "0.5",
    }  # fmt: skip


@on_gpu
def test_what_is_not_said_is_left_to_vllm(build: str) -> None:
    assert not {"--dtype", "--max-model-len", "--gpu-memory-utilization"} & set(vllm_arguments(LOCAL))
    assert "--enforce-eager" not in vllm_arguments(LOCAL)


@on_cpu
def test_a_cpu_computes_in_float32_without_compiling_unless_told_otherwise(build: str) -> None:
    arguments = vllm_arguments(LOCAL)
    assert arguments[arguments.index("--dtype") + 1] == "float32"
    assert "--enforce-eager" in arguments
    told = vllm_arguments(replace(LOCAL, dtype="bfloat16"))
    assert told[told.index("--dtype") + 1] == "bfloat16"
    assert "float32" not in told


def test_the_user_s_options_come_last_and_as_they_were_written() -> None:
    extra = ["--block-size", "16", "--max_num_seqs=3", "--hf-overrides", '{"a": 1}']
    assert vllm_arguments(replace(LOCAL, extra=extra))[-5:] == extra


@pytest.mark.parametrize("option", OWN_OPTIONS)
@pytest.mark.parametrize("spelling", ["{}", "{}=x", "{}=x=y"])
@pytest.mark.parametrize("underscores", [False, True])
def test_an_option_that_is_not_the_user_s_is_refused_in_every_spelling(
    option: str, spelling: str, underscores: bool
) -> None:
    prefix = option[: len(option) - len(option.lstrip("-"))]
    name = prefix + option.lstrip("-").replace("-", "_") if underscores else option
    with pytest.raises(UserError) as caught:
        vllm_arguments(replace(LOCAL, extra=["--max-num-seqs", "4", spelling.format(name), "value"]))
    assert str(caught.value) == f"grpo serve {option}: {OWN_OPTIONS[option]}"


def test_a_key_on_the_command_line_is_not_repeated() -> None:
    with pytest.raises(UserError, match="list of processes") as caught:
        vllm_arguments(replace(LOCAL, extra=[f"--api-key={KEY}"]))
    assert KEY not in str(caught.value)


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a key is made that nobody named."""
    path = tmp_path / "config" / "server-key"
    monkeypatch.setattr(server, "KEY_FILE", path)
    return path


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_on_this_machine_s_own_address_no_key_is_needed(key_file: Path, host: str) -> None:
    key = find_key(replace(LOCAL, host=host))
    assert (key.text, key.path) == (None, None)
    assert not key_file.exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "node1", ""])
def test_every_other_address_needs_a_key_and_gets_one(key_file: Path, host: str) -> None:
    key = find_key(replace(LOCAL, host=host))
    assert key.path == key_file
    assert key_file.read_text().strip() == key.text
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert find_key(replace(LOCAL, host=host)) == key, "the same at the next start"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_named_key_file_holds_whatever_the_address(key_file: Path, tmp_path: Path, host: str) -> None:
    mine = tmp_path / "mine"
    key = find_key(replace(LOCAL, host=host, api_key_file=mine))
    assert key.path == mine
    assert mine.read_text().strip() == key.text
    assert not key_file.exists()
    mine.write_text(KEY)
    assert find_key(replace(LOCAL, host=host, api_key_file=mine)).text == KEY


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        find_key(replace(LOCAL, api_key_file=path))


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_key(replace(LOCAL, api_key_file=Path("~/key"))).path == tmp_path / "key"
    assert find_key(replace(LOCAL, host="0.0.0.0")).path == tmp_path / ".config" / "grpo" / "server-key"


def test_a_key_in_vllm_s_own_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with pytest.raises(UserError, match="VLLM_API_KEY is set") as caught:
        serve(LOCAL)
    assert KEY not in str(caught.value)


def parsed(*extra: str, **changes: Any) -> Any:
    """What vLLM's own parser makes of it."""
    pytest.importorskip("vllm")
    return parse(replace(LOCAL, extra=extra, **changes))


def test_vllm_reads_what_it_is_told() -> None:
    arguments = parsed("--max-num-seqs", "7", "--hf_overrides", '{"a": 1}', port=8123, max_model_len=99)
    assert (arguments.model, arguments.host, arguments.port) == ("folder", "127.0.0.1", 8123)
    assert (arguments.max_num_seqs, arguments.max_model_len, arguments.hf_overrides) == (7, 99, {"a": 1})
    assert arguments.worker_extension_cls == "grpo_cli.serve.worker.WeightReceiver"
    assert arguments.weight_transfer_config == {"backend": "grpo"}
    assert arguments.logprobs_mode == "processed_logprobs"
    assert arguments.api_key is None
    assert arguments.allowed_origins == [], "no web page needs this server"


@on_cpu
def test_the_user_s_later_option_wins(build: str) -> None:
    assert parsed().block_size == 32
    assert parsed("--block-size", "16").block_size == 16
    assert parsed("--no-enforce-eager").enforce_eager is False


@on_cpu
@pytest.mark.parametrize(
    "extra", [["--enable-chunked-prefill"], ["--enable_chunked_prefill"], ["--long-prefill-token-threshold=9"]]
)
def test_on_a_cpu_an_option_that_splits_prompts_is_refused(build: str, extra: list[str]) -> None:
    assert parsed().enable_chunked_prefill is False
    with pytest.raises(UserError, match=r"^grpo serve --(enable-chunked-prefill|long-prefill-token-threshold): "):
        parsed(*extra)


@on_gpu
def test_on_a_gpu_vllm_decides_how_prompts_are_computed(build: str) -> None:
    assert parsed().enable_chunked_prefill is None
    assert parsed("--enable-chunked-prefill").enable_chunked_prefill is True


@pytest.mark.parametrize("option", ["--allowed-origins", "--allowed_origins"])
def test_web_pages_that_the_user_names_are_allowed(option: str) -> None:
    assert parsed(option, '["http://x"]').allowed_origins == ["http://x"]
    assert parsed(f'{option}=["http://x"]').allowed_origins == ["http://x"]


def test_a_request_s_head_is_limited_before_its_key_is_known() -> None:
    limited = server.http_options(parsed())
    # Of uvicorn's parsers only this one has limits.
    assert (limited["http"], limited["h11_max_incomplete_event_size"]) == ("h11", 65536)
    told = server.http_options(parsed("--h11-max-incomplete-event-size", "9000"))
    assert told["h11_max_incomplete_event_size"] == 9000


def test_the_web_server_takes_the_user_s_limits_and_certificates_and_is_quiet() -> None:
    quiet = server.http_options(parsed())
    assert (quiet["host"], quiet["port"]) == ("127.0.0.1", 8000)
    assert (quiet["log_level"], quiet["access_log"], quiet["ssl_certfile"]) == ("warning", False, None)
    told = server.http_options(
        parsed(
            "--ssl-keyfile", "k", "--ssl-certfile", "c", "--uvicorn-log-level", "info",
            "--no-disable-uvicorn-access-log",
        )
    )  # fmt: skip
    assert (told["ssl_keyfile"], told["ssl_certfile"]) == ("k", "c")
    assert (told["log_level"], told["access_log"]) == ("info", True)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--max-num-se", "3"], "unrecognized arguments: --max-num-se"),
        (["--api-ke", KEY], "unrecognized arguments: --api-ke"),
        (["--max-num-seqs", "many"], "invalid int value: 'many'"),
        (["--max-num-seqs"], "expected one argument"),
        (["--enable-auto-tool-choice"], "grpo serve: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_vllm_does_not_know_is_an_error_of_the_user(extra: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=r"^grpo serve: ") as caught:
        parsed(*extra)
    assert reason in str(caught.value)


@pytest.mark.parametrize(("gpus", "sharing"), [(8, 4), (2, 2), (0, 1)])
def test_auto_takes_as_many_gpus_as_can_share_the_model(
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpus: int,
    sharing: int,
) -> None:
    pytest.importorskip("vllm")
    arguments = parse(replace(LOCAL, model=str(tiny_model_dir), tp=None))
    assert arguments.tensor_parallel_size is None
    from vllm.engine.arg_utils import AsyncEngineArgs

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert server._gpus_for(AsyncEngineArgs.from_cli_args(arguments)) == sharing
    assert (f"{sharing} of {gpus} GPUs share 4 heads, 2 of keys" in capsys.readouterr().out) == (gpus > 0)


STOPS = """
import signal, sys, threading
from grpo_cli.serve import server
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
server._stop_with_stdin()
print("running", flush=True)
threading.Event().wait(20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what is accepted may not be as its listener is")
def test_connections_of_clients_that_vanished_are_looked_after() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        notice_vanished_clients(listener)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


def test_a_server_ends_when_its_standard_input_does() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.stdin.write("ignored\n")
        process.stdin.flush()
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(20) == 7
