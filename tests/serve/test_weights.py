"""A server generates from whole sets of weights only, and says why when it does not."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

fastapi = pytest.importorskip("fastapi")

from grpo_cli.serve import weights as weights_module  # noqa: E402
from grpo_cli.serve import wire  # noqa: E402
from grpo_cli.serve.protocol import (  # noqa: E402
    STAGING_FILE,
    BeginWeights,
    CommitWeights,
    Rendezvous,
    TensorSpec,
    Weights,
)
from grpo_cli.serve.weights import WeightStore, label  # noqa: E402

PATIENCE_S = 20.0
TENSORS = [TensorSpec(name="a", dtype="float32", shape=[100]), TensorSpec(name="b", dtype="bfloat16", shape=[3])]
GLOO = Rendezvous(backend="gloo", host="127.0.0.1", port=1234, world_size=2, group="g", timeout_s=7.0)


class Engine:
    """AsyncLLM as the store sees it: keeps the calls, and fails or answers as it is told to."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.paused = False
        self.digests: list[str] = ["d" * 32]
        self.failures: dict[str, Exception] = {}
        self.resets = True
        self.updates: list[dict[str, Any]] = []
        self.in_flight: asyncio.Event | None = None

    def _call(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name in self.failures:
            raise self.failures[name]

    async def pause_generation(self, *, mode: str) -> None:
        self._call("pause", mode)
        if self.in_flight is not None:
            await self.in_flight.wait()
        self.paused = True

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[str]:
        self._call(method)
        assert self.paused, "weights are loaded while the engine generates"
        self.updates.append(*args)
        return self.digests

    async def update_weight_version(self, version: str) -> None:
        self._call("version", version)

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> bool:
        self._call("reset", reset_running_requests)
        return self.resets

    async def resume_generation(self) -> None:
        self._call("resume")
        self.paused = False


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(weights_module, "memory_folder", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def store(engine: Engine, memory: Path) -> Iterator[WeightStore]:
    store = WeightStore(engine)
    yield store
    store.close()


def version(number: int, run: str = "run") -> Weights:
    return Weights(run=run, version=number)


def begin(number: int, rendezvous: Rendezvous | None = None) -> BeginWeights:
    return BeginWeights(weights=version(number), tensors=TENSORS, rendezvous=rendezvous)


def commit(number: int) -> CommitWeights:
    return CommitWeights(weights=version(number), digest="sent")


def run(action: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(action(), PATIENCE_S)

    return asyncio.run(bounded())


async def refused(action: Awaitable[Any]) -> Any:
    with pytest.raises(fastapi.HTTPException) as caught:
        await action
    return caught.value


def test_a_set_is_loaded_between_a_pause_and_a_resumption(engine: Engine, store: WeightStore) -> None:
    async def update() -> Any:
        assert (store.weights, store.refusing) == (None, None)
        staging = await store.begin(begin(3))
        assert engine.calls == [("pause", "wait")]
        assert "version 3 of run run" in str(store.refusing)
        assert store.weights is None
        return staging, await store.commit(commit(3))

    staging, committed = run(update)
    assert staging.path == str(store.probe.with_name(STAGING_FILE)), "the only place that a trainer writes to"
    assert engine.calls[1:] == [("load_weight_set",), ("version", "run:3"), ("reset", True), ("resume",)]
    assert (store.weights, store.refusing) == (version(3), None)
    assert (committed.weights, committed.digest) == (version(3), "d" * 32)
    assert label(version(3)) == "run:3"
    (sent,) = engine.updates
    assert sent == {
        "tensors": [spec.model_dump() for spec in TENSORS],
        "digest": "sent",
        "path": staging.path,
    }


def test_a_broadcast_needs_no_file(engine: Engine, store: WeightStore, memory: Path) -> None:
    async def update() -> None:
        staging = await store.begin(begin(1, GLOO))
        assert staging.path is None
        await store.commit(commit(1))

    run(update)
    (sent,) = engine.updates
    assert sent["rendezvous"] == GLOO.model_dump()
    assert sent["timeout_s"] == 7.0, "the workers give up when the trainer does"
    assert "path" not in sent
    assert [path.name for path in memory.rglob("*") if path.is_file()] == ["instance"]


def test_the_server_refuses_before_what_is_in_flight_has_ended(engine: Engine, store: WeightStore) -> None:
    async def update() -> None:
        engine.in_flight = asyncio.Event()
        beginning = asyncio.create_task(store.begin(begin(1)))
        while not engine.calls:
            await asyncio.sleep(0)
        assert store.refusing is not None
        assert not beginning.done()
        engine.in_flight.set()
        await beginning

    run(update)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            {"failures": {"load_weight_set": ValueError("what arrived\n has digest x")}},
            "what arrived has digest x",
        ),
        ({"failures": {"load_weight_set": RuntimeError()}}, "RuntimeError"),
        ({"failures": {"version": RuntimeError("engine core died")}}, "engine core died"),
        ({"failures": {"reset": RuntimeError("no answer")}}, "no answer"),
        ({"digests": ["one", "two"]}, "different weights: digests one, two"),
        ({"digests": []}, "different weights"),
        ({"resets": False}, "the prefix cache could not be dropped"),
    ],
    ids=["load", "load without words", "version", "reset", "digests", "no worker", "cache"],
)
def test_after_a_failure_the_server_refuses_until_a_whole_set_is_there(
    engine: Engine, store: WeightStore, fault: dict[str, Any], reason: str
) -> None:
    async def update() -> None:
        await store.begin(begin(1))
        await store.commit(commit(1))
        for name, value in fault.items():
            setattr(engine, name, value)
        await store.begin(begin(2))
        error = await refused(store.commit(commit(2)))
        assert error.status_code == 500
        assert reason in error.detail
        assert "version 2 of run run did not arrive whole" in error.detail
        assert store.refusing == error.detail
        assert "\n" not in error.detail
        assert engine.paused
        assert (await refused(store.commit(commit(2)))).status_code == 409, "each set is begun"
        assert engine.paused

        engine.failures, engine.digests, engine.resets = {}, ["d" * 32], True
        await store.begin(begin(2))
        await store.commit(commit(2))
        assert (store.weights, store.refusing, engine.paused) == (version(2), None, False)

    run(update)


def test_an_engine_that_cannot_pause_leaves_the_server_refusing(engine: Engine, store: WeightStore) -> None:
    async def update() -> None:
        await store.begin(begin(1))
        engine.failures = {"pause": RuntimeError("dead")}
        with pytest.raises(RuntimeError, match="dead"):
            await store.begin(begin(2))
        assert store.refusing is not None
        assert (await refused(store.commit(commit(2)))).status_code == 409
        assert (await refused(store.commit(commit(1)))).status_code == 409

    run(update)


def test_only_what_was_begun_last_can_be_committed(engine: Engine, store: WeightStore) -> None:
    async def update() -> None:
        assert (await refused(store.commit(commit(1)))).status_code == 409
        await store.begin(begin(1))
        await store.begin(begin(2))
        error = await refused(store.commit(commit(1)))
        assert (error.status_code, "version 1 of run run was not begun" in error.detail) == (409, True)
        other = CommitWeights(weights=version(2, run="another"))
        assert (await refused(store.commit(other))).status_code == 409
        assert engine.updates == []
        await store.commit(commit(2))
        assert store.weights == version(2)
        assert (await refused(store.commit(commit(2)))).status_code == 409
        assert len(engine.updates) == 1

    run(update)


def test_a_begin_waits_for_a_commit_that_is_under_way(engine: Engine, store: WeightStore) -> None:
    async def update() -> None:
        gate, load = asyncio.Event(), engine.collective_rpc

        async def slow(*args: Any, **kwargs: Any) -> list[str]:
            await gate.wait()
            return await load(*args, **kwargs)

        engine.collective_rpc = slow  # type: ignore[method-assign]
        await store.begin(begin(1))
        committing = asyncio.create_task(store.commit(commit(1)))
        beginning = asyncio.create_task(store.begin(begin(2)))
        for _ in range(10):
            await asyncio.sleep(0)
        assert engine.calls == [("pause", "wait")]
        gate.set()
        await committing
        await beginning
        assert store.refusing is not None
        assert engine.calls[-2:] == [("resume",), ("pause", "wait")]

    run(update)


def test_what_is_begun_is_announced_to_whoever_asks_why(engine: Engine, memory: Path) -> None:
    store = WeightStore(engine, refusing="it was started without weights")

    async def update() -> None:
        assert store.refusing == "it was started without weights"
        await store.begin(begin(1))
        await store.commit(commit(1))

    run(update)
    assert store.refusing is None
    store.close()


def mode_of(path: str | Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_weights_in_memory_are_their_owner_s_alone(engine: Engine, memory: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        store = WeightStore(engine)
        staging = run(lambda: store.begin(begin(1)))
    finally:
        os.umask(before)
    assert mode_of(staging.path) == 0o600
    assert mode_of(Path(staging.path).parent) == 0o700
    assert Path(staging.path).parent.parent == memory
    assert os.stat(staging.path).st_size == wire.total_bytes(wire.plan_buckets(TENSORS))
    store.close()


def test_the_file_has_the_size_of_the_set_that_is_on_its_way(engine: Engine, store: WeightStore) -> None:
    async def update() -> None:
        large = await store.begin(begin(1))
        small = await store.begin(BeginWeights(weights=version(2), tensors=TENSORS[1:]))
        assert small.path == large.path
        assert os.stat(small.path).st_size == 64

    run(update)


def test_who_can_read_the_probe_shares_the_memory(store: WeightStore) -> None:
    assert store.probe.read_text() == store.instance
    assert mode_of(store.probe.parent) == 0o700


def test_no_two_servers_are_the_same_instance(engine: Engine, memory: Path) -> None:
    stores = [WeightStore(engine) for _ in range(2)]
    assert stores[0].instance != stores[1].instance
    assert stores[0].probe != stores[1].probe
    for store in stores:
        store.close()


def test_without_room_the_set_is_refused_and_nothing_is_left(
    engine: Engine, store: WeightStore, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    async def update() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(weights_module.os, "posix_fallocate", full)
            error = await refused(store.begin(begin(1)))
        assert error.status_code == 507
        assert error.detail == store.refusing
        assert "has no room for 512 bytes of weights: No space left on device" in error.detail
        assert [path.name for path in memory.rglob("*") if path.is_file()] == ["instance"]
        assert (await refused(store.commit(commit(1)))).status_code == 409
        await store.begin(begin(1))
        await store.commit(commit(1))
        assert store.refusing is None

    run(update)


def test_closing_leaves_nothing_in_memory(engine: Engine, memory: Path) -> None:
    store = WeightStore(engine)
    run(lambda: store.begin(begin(1)))
    assert list(memory.iterdir())
    store.close()
    assert not list(memory.iterdir())
    store.close()


def test_memory_is_used_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module.os, "access", lambda path, mode: True)
    assert weights_module.memory_folder() == "/dev/shm"
    monkeypatch.setattr(weights_module.os, "access", lambda path, mode: False)
    assert weights_module.memory_folder() == tempfile.gettempdir()


def test_a_call_on_an_engine_that_dies_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "ALIVE_CHECK_S", 0.01)

    async def ask() -> None:
        engine = SimpleNamespace(errored=False)
        asyncio.get_running_loop().call_later(0.05, setattr, engine, "errored", True)
        await weights_module.while_alive(engine, asyncio.Event().wait())

    with pytest.raises(RuntimeError, match="the engine died"):
        asyncio.run(ask())
