"""The routes of `/v1/grpo`, beside those of vLLM's own server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm.utils import random_uuid

from grpo_cli.errors import one_line
from grpo_cli.serve import protocol
from grpo_cli.serve.protocol import (
    BeginWeights,
    Body,
    CommitWeights,
    GenerateRequest,
    GenerateResponse,
    Refused,
    ServerInfo,
    Weights,
)
from grpo_cli.serve.sampling import sampled_tokens, sampling_params
from grpo_cli.serve.weights import WeightStore, label, while_alive

MAX_BODY_BYTES = 32 * 2**20
"""Of a request to our own routes. A million tokens, or the names of a hundred thousand tensors, take a third."""


def grpo_routes(engine: Any, store: WeightStore) -> APIRouter:
    """Routes that generate from token ids and take weights."""
    router = APIRouter()

    @router.get(protocol.INFO)
    async def info() -> ServerInfo:
        if engine.errored:  # the server ends within seconds, and until then all else looks well
            raise HTTPException(503, "the engine died")
        model, config = engine.model_config, engine.vllm_config
        return ServerInfo(
            instance=store.instance,
            weights=store.weights,
            refusing=store.refusing,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=model.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            world_size=config.parallel_config.world_size_across_dp,
            devices=store.devices,
            memory_probe=str(store.probe),
        )

    @router.post(protocol.GENERATE)
    async def generate(request: GenerateRequest, client: Request) -> Response:
        check_request(request, engine.model_config)
        check_weights(request.weights, store)
        answer = asyncio.create_task(_generate(engine, store, request))
        gone = asyncio.create_task(_disconnected(client))
        await asyncio.wait({answer, gone}, timeout=protocol.HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
        has_gone = gone.done()
        gone.cancel()
        if answer.done():  # what is wrong with the request shows at once, while there can be a status for it
            return Response(answer.result().model_dump_json(), media_type="application/json")
        if has_gone:
            answer.cancel()
            return Response()  # nobody reads it
        return StreamingResponse(_with_heartbeat(answer, engine, store), media_type="application/json")

    @router.post(protocol.BEGIN_WEIGHTS)
    async def begin(request: BeginWeights) -> Response:
        return await answered(store.begin(request))

    @router.post(protocol.COMMIT_WEIGHTS)
    async def commit(request: CommitWeights) -> Response:
        return await answered(store.commit(request))

    transfers: set[asyncio.Future[Body]] = set()

    async def answered(transfer: Awaitable[Body]) -> Response:
        work = asyncio.ensure_future(transfer)
        transfers.add(work)  # it goes on if the client goes: what has begun is whole afterwards, or refused
        work.add_done_callback(transfers.discard)
        # An error is then known, also where no client waits for it.
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, _ = await asyncio.wait({work}, timeout=protocol.HEARTBEAT_S)
        if done:
            return Response(work.result().model_dump_json(), media_type="application/json")
        return StreamingResponse(_with_blanks(work), media_type="application/json")

    return router


def check_request(request: GenerateRequest, model_config: Any) -> None:
    """Raise HTTPException 400 for a prompt that the model cannot take."""
    length, limit = len(request.token_ids), model_config.max_model_len
    if length + request.max_completion_tokens > limit:
        raise HTTPException(
            400,
            f"a prompt of {length} tokens and max_completion_tokens {request.max_completion_tokens} exceed the "
            f"server's --max-model-len {limit}",
        )
    vocabulary = model_config.get_vocab_size()
    for field, tokens in (("token_ids", request.token_ids), ("stop_token_ids", request.stop_token_ids)):
        if tokens and max(tokens) >= vocabulary:
            raise HTTPException(400, f"{field}: {max(tokens)} is not in the vocabulary of {vocabulary}")


def check_weights(wanted: Weights | None, store: WeightStore) -> None:
    """Raise HTTPException 409 unless the weights that shall generate are there and whole."""
    if store.refusing is not None:
        raise HTTPException(409, store.refusing)
    if wanted is not None and wanted != store.weights:
        loaded = store.weights or "what the server was started with"
        raise HTTPException(409, f"the server has {loaded}, not {wanted}")


async def _generate(engine: Any, store: WeightStore, request: GenerateRequest) -> GenerateResponse:
    weights = store.weights
    params = sampling_params(request, n=request.n, seed=request.seed, stop_token_ids=request.stop_token_ids)
    outputs = engine.generate({"prompt_token_ids": request.token_ids}, params, random_uuid())
    *_, output = [output async for output in outputs]  # one, since only the final one was asked for
    versions = {span.version for part in output.outputs for span in part.weight_versions or []}
    # Those that the server started with have no label; generation only resumes once others have their name.
    is_whole = store.weights is None if weights is None else versions == {label(weights)}
    if not is_whole:
        return GenerateResponse(weights=weights, interrupted="the weights changed while it was generated")
    try:
        return GenerateResponse(weights=weights, completions=sampled_tokens(output))
    except InterruptedError as error:
        return GenerateResponse(weights=weights, interrupted=str(error))


async def _disconnected(client: Request) -> None:
    """Return when the client closes its connection. Its request has been read, so nothing else can come."""
    while (await client.receive())["type"] != "http.disconnect":
        pass


async def _with_heartbeat(
    answer: asyncio.Task[GenerateResponse], engine: Any, store: WeightStore
) -> AsyncIterator[bytes]:
    """A JSON document after a blank for each time that the engine was asked and answered.

    So the client can tell a long generation from a server that hangs. An error ends the connection without a
    document, as the death of the server does.
    """
    try:
        while not answer.done():
            await while_alive(engine, engine.is_paused())
            yield b" "
            await asyncio.wait({answer}, timeout=protocol.HEARTBEAT_S)
            if store.is_drained and not answer.done():  # it came just too late, and is waiting for new weights
                late = GenerateResponse(weights=store.weights, interrupted=store.refusing)
                yield late.model_dump_json().encode()
                return
        yield answer.result().model_dump_json().encode()
    finally:
        answer.cancel()  # the client has gone


async def _with_blanks(work: asyncio.Future[Body]) -> AsyncIterator[bytes]:
    """A JSON document after blanks, so that a client can tell a long transfer from a link that carries nothing.

    The store watches the engine while it waits for it. An engine that lives and hangs has `TRANSFER_TIMEOUT_S`.
    """
    deadline = time.monotonic() + protocol.TRANSFER_TIMEOUT_S
    while not work.done() and time.monotonic() < deadline:
        yield b" "
        await asyncio.wait({work}, timeout=protocol.HEARTBEAT_S)
    try:
        answer = work.result() if work.done() else Refused(status=504, detail="the engine takes too long")
    except HTTPException as error:
        answer = Refused(status=error.status_code, detail=str(error.detail))
    except Exception as error:  # the status has been sent: this is the only way left to tell it
        answer = Refused(status=500, detail=one_line(error))
    yield answer.model_dump_json().encode()


class Gate:
    """ASGI middleware: vLLM's own routes do not generate either while the weights are not whole."""

    def __init__(self, app: Any, store: WeightStore) -> None:
        self.app = app
        self.store = store

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_foreign = scope["type"] != "lifespan" and not scope["path"].startswith(protocol.PREFIX)
        if self.store.refusing is not None and is_foreign and scope.get("method") not in ("GET", "HEAD"):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1013})
                return
            await JSONResponse({"detail": self.store.refusing}, 503)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class BodyLimit:
    """ASGI middleware: a body that is larger than any that our routes need is not read into memory."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(protocol.PREFIX):
            await self.app(scope, receive, send)
            return
        size = 0

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:  # whatever length was announced, if any
                raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
            return message

        await self.app(scope, limited, send)
