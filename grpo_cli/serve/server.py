"""`grpo serve`: vLLM's engine and HTTP app, with the routes, the weights and the lock that online RL needs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from grpo_cli.errors import RunError, UserError, one_line
from grpo_cli.hub import tell_download
from grpo_cli.serve.engine_arguments import (
    HOW_TO_INSTALL,
    REQUIRED,
    as_options,
    engine_defaults,
    most_sharing,
    refuse_splitting,
)
from grpo_cli.serve.lock import Lock, is_loopback, make_key_file

KEY_FILE = Path("~/.config/grpo/server-key")
"""Where a key is generated when the server must have one and none was given."""

MAX_HEAD_BYTES = 64 * 2**10
"""Of what is kept of a request before its key can be checked, unless the user says otherwise."""

OWN_OPTIONS = {
    "--api-key": "the key would be seen in the list of processes; write it to a file and use --api-key-file",
    "--worker-extension-cls": "grpo serve sets it",
    "--weight-transfer-config": "grpo serve sets it",
    "--logprobs-mode": "grpo serve sets it",
    "--uds": "a server for training listens on --host and --port",
    "--headless": "it runs an engine without a server",
    "--api-server-count": "grpo serve has one, which knows the state of the weights",
    "-asc": "grpo serve has one, which knows the state of the weights",
    "--host": "after -- it would decide where to listen without deciding about the key; write it before",
    "--config": "a file could set what may not be passed through",
}
"""Options of vLLM that may not be passed through, and why."""


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says; None leaves it to vLLM."""

    model: str
    host: str
    port: int
    api_key_file: Path | None
    tp: int | None = 1
    """None for as many of this machine's GPUs as can share the model."""
    dp: int = 1
    dtype: str | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    stop_with_stdin: bool = False
    extra: Sequence[str] = field(default_factory=list)
    """Options of vLLM as they were written."""


@dataclass(frozen=True)
class Key:
    text: str | None
    path: Path | None


def find_key(options: ServeOptions) -> Key:
    """The key that requests must carry; none is needed on this machine's own address.

    Raises:
        UserError: the key file cannot be used.
    """
    if options.api_key_file is None and is_loopback(options.host):
        return Key(None, None)
    path = (options.api_key_file or KEY_FILE).expanduser()
    return Key(make_key_file(path), path)


def vllm_arguments(options: ServeOptions) -> list[str]:
    """The command line in vLLM's words.

    Raises:
        UserError: an option is not for the user to set.
    """
    for argument in options.extra:
        name = argument.partition("=")[0].replace("_", "-")
        if name in OWN_OPTIONS:
            raise UserError(f"grpo serve {name}: {OWN_OPTIONS[name]}")
    chosen = {
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    arguments = engine_defaults() | {name: value for name, value in chosen.items() if value is not None}
    return [
        "--model", options.model,
        "--host", options.host,
        "--port", str(options.port),
        "--tensor-parallel-size", str(options.tp or 1),
        "--data-parallel-size", str(options.dp),
        *as_options(arguments),
        *options.extra,
    ]  # fmt: skip


def parse(options: ServeOptions) -> Namespace:
    """vLLM's own reading of the options.

    Raises:
        UserError: it does not know one, or a value is wrong.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"grpo serve: {message}")

    parser = make_arg_parser(Parser(prog="grpo serve", allow_abbrev=False))
    parser.set_defaults(
        allowed_origins=[],  # no web page needs this server
        uvicorn_log_level="warning",
        disable_uvicorn_access_log=True,  # a line for each request would bury what the engine says
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    arguments = parser.parse_args(vllm_arguments(options))
    if arguments.model_tag is not None:
        raise UserError(f"grpo serve: {arguments.model_tag} belongs to no option")
    try:
        validate_parsed_serve_args(arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"grpo serve: {error}") from error
    refuse_splitting(vars(arguments), lambda name: f"grpo serve --{name.replace('_', '-')}")
    vars(arguments).update(REQUIRED)
    if options.tp is None:
        arguments.tensor_parallel_size = None  # found once the model's configuration is there
    return arguments


def serve(options: ServeOptions) -> None:
    """Run until a signal or the engine's death.

    Raises:
        UserError: an option, the key file or the model is wrong.
        RunError: the engine did not start, or died.
    """
    # A scheduler sends it to every process of a job; it is for the trainer.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if os.environ.pop("VLLM_API_KEY", None):
        raise UserError("VLLM_API_KEY is set, but grpo serve reads its key from --api-key-file; unset it")
    key = find_key(options)
    try:
        import uvloop
    except ImportError as error:
        raise UserError(f"grpo serve needs vLLM: {HOW_TO_INSTALL}") from error
    arguments = parse(options)
    if options.stop_with_stdin:
        _stop_with_stdin()
    tell_download("model", arguments.model, arguments.revision)
    uvloop.run(_run(arguments, key))


def _gpus_for(engine_arguments: Any) -> int:
    """How many of this machine's GPUs can share the model, each of its copies on GPUs of its own."""
    import torch

    config = engine_arguments.create_model_config().hf_text_config
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    intermediate = getattr(config, "intermediate_size", None) or 0
    gpus = torch.cuda.device_count()
    sharing = most_sharing(gpus // engine_arguments.data_parallel_size, heads, kv_heads, intermediate)
    if gpus:
        print(f"--tp auto: {sharing} of {gpus} GPUs share {heads} heads, {kv_heads} of keys", flush=True)
    return sharing


async def _run(arguments: Namespace, key: Key) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client_from_engine_args
    from vllm.entrypoints.launchers.launcher import serve_http, setup_server

    from grpo_cli.serve.weights import WeightStore

    try:
        address, listener = setup_server(arguments, reuse_port=False)
    except OSError as error:
        raise UserError(
            f"grpo serve: cannot listen on {arguments.host}:{arguments.port}: {error.strerror}"
        ) from error
    notice_vanished_clients(listener)
    # While the engine loads, too; later vLLM's server has a handler of its own.
    signal.signal(signal.SIGTERM, _stop_while_loading)
    try:
        engine_arguments = AsyncEngineArgs.from_cli_args(arguments)
        if arguments.tensor_parallel_size is None:
            engine_arguments.tensor_parallel_size = _gpus_for(engine_arguments)
        engine_arguments.create_engine_config()
    except (ValueError, OSError, TypeError) as error:
        raise UserError(f"grpo serve: {one_line(error, 1000)}") from error
    try:
        async with build_async_engine_client_from_engine_args(engine_arguments) as engine:
            await engine.collective_rpc("stop_with_server", args=(os.getpid(),))
            is_dummy = str(arguments.load_format) == "dummy"
            refusing = "it was started without weights (--load-format dummy)" if is_dummy else None
            store = WeightStore(engine, refusing=refusing, devices=await engine.collective_rpc("device_id"))
            try:
                app = await build_app(engine, store, arguments, key.text)
                ready = asyncio.create_task(_announce(app, address, arguments.model, store, key))
                stopping = await serve_http(app, sock=listener, **http_options(arguments))
                ready.cancel()
                died = engine.errored
            finally:
                store.close()
        await stopping
    except RuntimeError as error:
        raise RunError(f"grpo serve: vLLM failed, its log above says why ({one_line(error, 1000)})") from error
    finally:
        listener.close()
    if died:
        raise RunError("grpo serve: the engine died, its log above says why; the trainer waits for a new server")


def notice_vanished_clients(listener: socket.socket) -> None:
    """Make accepted connections end two minutes after their other end has gone without a farewell.

    Otherwise a trainer whose machine or link is gone leaves them open for ever.
    """
    seconds = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
    for name, value in ({"SO_KEEPALIVE": 1, "TCP_USER_TIMEOUT": 120_000} | seconds).items():
        if hasattr(socket, name):  # not all systems have all of them
            level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
            listener.setsockopt(level, getattr(socket, name), value)


def _stop_while_loading(number: int, frame: Any) -> NoReturn:
    """End at once, with the engine: an exception would wait in vLLM for an engine that never gets ready."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    os._exit(128 + number)


def http_options(arguments: Namespace) -> dict[str, Any]:
    """What vLLM hands to its web server; TLS and limits are the user's to set."""
    same = ("host", "port", "enable_ssl_refresh", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs",
            "ssl_ciphers", "h11_max_incomplete_event_size", "h11_max_header_count")  # fmt: skip
    return {name: getattr(arguments, name) for name in same} | {
        "http": "h11",  # the faster parser has no limits: whoever reaches the port could fill the memory
        "log_level": arguments.uvicorn_log_level,
        "access_log": not arguments.disable_uvicorn_access_log,
        "timeout_graceful_shutdown": 5,  # what waits for a dead engine waits for ever
    }


async def build_app(engine: Any, store: Any, arguments: Namespace, key: str | None) -> Any:
    """vLLM's app with our routes, behind the lock."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app as build_vllm_app

    from grpo_cli.serve.routes import BodyLimit, Gate, grpo_routes

    tasks = await engine.get_supported_tasks()
    app = build_vllm_app(arguments, tasks, engine.model_config)
    await init_app_state(engine, app.state, arguments, tasks)
    app.include_router(grpo_routes(engine, store))
    # Outside of everything, error handlers included: nothing is answered without the key.
    app.middleware_stack = Lock(Gate(BodyLimit(app.build_middleware_stack()), store), key)
    return app


async def _announce(app: Any, address: str, model: str, store: Any, key: Key) -> None:
    while not (hasattr(app.state, "server") and app.state.server.started):
        await asyncio.sleep(0.05)
    lock = f"key file {key.path}" if key.path else "no key: this machine only"
    state = "waiting for weights" if store.refusing else "weights version 0, as loaded"
    print(f"ready: {address}  model {model}  {state}  {lock}", flush=True)


def _stop_with_stdin() -> None:
    """Stop when the other end of standard input closes, which it does however a parent process ends."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):  # a buffered read would hold a lock that the exit needs
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
