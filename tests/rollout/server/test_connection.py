"""Whatever a server does, a call to it ends, an error names it, and no wrong answer is taken."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError, UserError
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server import connection
from grpo_cli.rollout.server.connection import LinkBroken, ServerAway, ServerConnection, WrongWeights
from grpo_cli.serve import protocol, wire
from grpo_cli.serve.protocol import GenerateRequest, Weights
from tests.conftest import tiny_llama
from tests.rollout.server import fake_server
from tests.rollout.server.fake_server import PATIENCE_S, FakePolicy, FakeServer, tokens_of

KEY = "correct-horse-battery-staple"
V1, V2 = Weights(run="run", version=1), Weights(run="run", version=2)
UPDATE = [protocol.INFO, protocol.BEGIN_WEIGHTS, protocol.COMMIT_WEIGHTS]


@pytest.fixture(autouse=True)
def short_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is silence while a server is at work: here no longer than at other times."""
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.05)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    fake = FakeServer(tmp_path)
    yield fake
    fake.die()


@pytest.fixture
def connect() -> Iterator[Callable[..., ServerConnection]]:
    servers: list[ServerConnection] = []

    def make(fake: FakeServer, key: str | None = None, timeout_s: float = PATIENCE_S) -> ServerConnection:
        servers.append(ServerConnection(fake.url, key, timeout_s))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(fake: FakeServer, connect: Any) -> ServerConnection:
    return connect(fake)


def request(weights: Weights | None = V1, **changes: Any) -> GenerateRequest:
    return GenerateRequest(
        **{"token_ids": [1, 2], "n": 2, "max_completion_tokens": 4, "seed": 40, "weights": weights} | changes
    )


AWAY = [500, 502, 503, "drop", "garbage", "silent", "restart"]
CALLS = [
    (protocol.INFO, lambda server: server.info()),
    (protocol.GENERATE, lambda server: server.generate(request())),
    (protocol.BEGIN_WEIGHTS, lambda server: server.send_weights(V1, FakePolicy(1))),
    (protocol.COMMIT_WEIGHTS, lambda server: server.send_weights(V1, FakePolicy(1))),
]
on_every_call = pytest.mark.parametrize(("path", "call"), CALLS, ids=["info", "generate", "begin", "commit"])


@on_every_call
@pytest.mark.parametrize("fault", AWAY)
def test_a_server_that_fails_or_is_silent_is_away(
    fake: FakeServer, connect: Any, path: str, call: Any, fault: Any
) -> None:
    server = connect(fake, timeout_s=1.0 if fault == "silent" else PATIENCE_S)
    fake.faults[path] = [fault]
    with pytest.raises(ServerAway, match=fake.url):
        call(server)
    assert fake.count(path) == 1, "no call is repeated here: the caller knows what it repeats"


@on_every_call
@pytest.mark.parametrize(
    ("fault", "error", "reason"),
    [
        (401, UserError, r"--api-key-file; set generation\.server\.api_key_file"),
        (400, RunError, "answers 400: told to answer 400"),
        (404, RunError, "answers 404: told to answer 404"),
        (422, RunError, "answers 422"),
        (409, WrongWeights, "told to answer 409"),
        (302, RunError, "answers 302"),
        ("html", RunError, "is no grpo serve of this version: .* gives <html>welcome"),
        ("other json", RunError, "is no grpo serve of this version"),
    ],
)
def test_an_answer_that_waiting_does_not_change_is_an_error_of_its_own(
    fake: FakeServer, server: ServerConnection, path: str, call: Any, fault: Any, error: Any, reason: str
) -> None:
    fake.faults[path] = [fault]
    with pytest.raises(error, match=reason) as caught:
        call(server)
    assert fake.url in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error"), [(409, WrongWeights), (500, ServerAway), (504, LinkBroken), (400, RunError)]
)
@pytest.mark.parametrize(("path", "call"), CALLS[2:], ids=["begin", "commit"])
def test_a_late_refusal_is_one_all_the_same(
    fake: FakeServer, server: ServerConnection, path: str, call: Any, status: int, error: Any
) -> None:
    fake.answers[path] = lambda answer: {"status": status, "detail": "too late"}
    with pytest.raises(error, match=f"{fake.url}.*too late"):
        call(server)


def test_each_call_has_a_connection_of_its_own(
    fake: FakeServer, server: ServerConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for the next call may be forgotten on the way, and then each call would be in vain."""
    opened, create = [], socket.create_connection

    def counted(*args: Any, **kwargs: Any) -> socket.socket:
        opened.append(args)
        return create(*args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", counted)
    server.info()
    server.info()
    assert len(opened) == 2


def test_a_server_that_is_not_there_is_away(fake: FakeServer, server: ServerConnection) -> None:
    fake.die()
    with pytest.raises(ServerAway, match=f"{fake.url} does not answer"):
        server.info()


def test_only_who_has_the_key_is_answered(tmp_path: Path, connect: Any) -> None:
    fake = FakeServer(tmp_path, key=KEY)
    assert connect(fake, key=KEY).info().instance == fake.instance
    for key in (None, "another-key-altogether"):
        with pytest.raises(UserError, match="api_key_file") as caught:
            connect(fake, key=key).info()
        assert KEY not in str(caught.value)
    fake.die()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_key_and_weights_go_through_no_proxy(
    fake: FakeServer, connect: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert connect(fake, timeout_s=1).info().instance == fake.instance


def test_waiting_ends_when_the_server_answers(fake: FakeServer, server: ServerConnection) -> None:
    fake.faults[protocol.INFO] = ["drop", 503]
    attempts: list[int] = []
    assert server.wait_until_ready(lambda: attempts.append(1)).instance == fake.instance
    assert len(attempts) == fake.count(protocol.INFO) == 3


def test_waiting_ends_in_time(fake: FakeServer, connect: Any) -> None:
    fake.die()
    with pytest.raises(ServerAway, match=r"does not answer .* and for 0\.15 s before"):
        connect(fake, timeout_s=0.15).wait_until_ready()


def test_waiting_ends_when_there_is_no_point_in_it(fake: FakeServer, server: ServerConnection) -> None:
    fake.die()

    def gone() -> None:
        raise RunError("it ended")

    with pytest.raises(RunError, match="it ended"):
        server.wait_until_ready(gone)


def test_waiting_does_not_outlast_a_wrong_key(fake: FakeServer, server: ServerConnection) -> None:
    fake.faults[protocol.INFO] = [503, 401]
    with pytest.raises(UserError, match="api_key_file"):
        server.wait_until_ready()


def test_a_group_comes_back(fake: FakeServer, server: ServerConnection) -> None:
    server.send_weights(V1, FakePolicy(11))
    response = server.generate(request())
    assert [part.token_ids for part in response.completions] == [tokens_of(request(), 11, i) for i in range(2)]
    assert response.weights == V1
    assert server.generate(request(weights=None)).weights == V1


def test_blanks_before_an_answer_are_no_part_of_it(
    fake: FakeServer, server: ServerConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.send_weights(V1, FakePolicy(11))
    dumps = json.dumps
    monkeypatch.setattr("tests.rollout.server.fake_server.json.dumps", lambda value: "   " + dumps(value))
    assert len(server.generate(request()).completions) == 2


def test_an_interrupted_generation_is_to_be_repeated(fake: FakeServer, server: ServerConnection) -> None:
    server.send_weights(V1, FakePolicy(1))
    fake.answers[protocol.GENERATE] = lambda answer: answer | {"completions": [], "interrupted": "it was aborted"}
    with pytest.raises(ServerAway, match=f"{fake.url}: it was aborted"):
        server.generate(request())


@pytest.mark.parametrize("weights", [V2.model_dump(), {"run": "other", "version": 1}, None])
def test_what_other_weights_generated_is_not_taken(
    fake: FakeServer, server: ServerConnection, weights: Any
) -> None:
    server.send_weights(V1, FakePolicy(1))
    fake.answers[protocol.GENERATE] = lambda answer: answer | {"weights": weights}
    with pytest.raises(WrongWeights, match="generated with"):
        server.generate(request())


@pytest.fixture(params=["memory", "gloo"])
def way(request: pytest.FixtureRequest, fake: FakeServer) -> str:
    """That the weights take: without the probe the server is on another machine."""
    if request.param == "gloo":
        fake.probe.unlink()
        fake.shares_memory = False
    return str(request.param)


def assert_has(fake: FakeServer, policy: FakePolicy, weights: Weights) -> None:
    assert (fake.weights, fake.refusing) == (weights, None)
    assert fake.loaded.keys() == policy.tensors.keys()
    for name, tensor in policy.tensors.items():
        assert torch.equal(fake.loaded[name].float(), tensor), name


def test_a_server_without_room_is_sent_the_weights_by_broadcast(
    fake: FakeServer, server: ServerConnection
) -> None:
    fake.faults[protocol.BEGIN_WEIGHTS] = [507]
    policy = FakePolicy(1)
    server.send_weights(V1, policy)
    assert_has(fake, policy, V1)
    assert fake.rendezvous[-1] is not None


@pytest.fixture
def gpu_of_thread(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """As if there were a GPU, by torch's own reading of a device; which one each thread has made current."""
    chosen: dict[str, int] = {}

    def choose(index: int) -> None:
        chosen[threading.current_thread().name] = index

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", choose, raising=False)
    return chosen


def test_one_process_on_a_gpu_sends_its_weights(
    fake: FakeServer, server: ServerConnection, way: str, gpu_of_thread: dict[str, int]
) -> None:
    model = tiny_llama()
    assert server.send_weights(V1, PolicyWeights(model, device=Ranks().device)) > 0
    assert (fake.weights, fake.refusing) == (V1, None)
    assert torch.equal(fake.loaded["model.norm.weight"], model.model.norm.weight)
    assert set(gpu_of_thread.values()) == {0}


def test_the_thread_that_sends_by_nccl_computes_on_the_policy_s_gpu(
    fake: FakeServer, server: ServerConnection, gpu_of_thread: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL itself takes two GPUs: here the ranks fail to meet."""
    met: list[Any] = []

    def meet(backend: str, *others: Any) -> Any:
        met.append((backend, others[-1]))
        raise RuntimeError("the ranks did not meet")

    monkeypatch.setattr(connection, "LAST_WORD_S", 0.1)
    monkeypatch.setattr(ServerConnection, "_can_use_nccl", lambda *_: True)
    monkeypatch.setattr(wire, "join_group", meet)
    with pytest.raises(ServerAway):
        server.send_weights(V1, PolicyWeights(tiny_llama(), device=torch.device("cuda", 1)))
    assert ("nccl", torch.device("cuda", 1)) in met
    assert set(gpu_of_thread.values()) == {1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_server_gets_every_tensor_in_its_own_dtype(
    fake: FakeServer, server: ServerConnection, way: str, dtype: str
) -> None:
    fake.dtype = dtype
    policy = FakePolicy(1)
    moved = server.send_weights(V1, policy)
    assert moved == wire.total_bytes(wire.plan_buckets(policy.specs(dtype)))
    assert_has(fake, policy, V1)
    assert {str(tensor.dtype) for tensor in fake.loaded.values()} == {f"torch.{dtype}"}
    policy.set(2)
    server.send_weights(V2, policy)
    assert_has(fake, policy, V2)
    assert [meeting is not None for meeting in fake.rendezvous] == [way == "gloo"] * 2


@pytest.mark.parametrize("num_tensors", [1, 300])
def test_an_update_takes_three_calls_however_many_tensors_and_buckets_there_are(
    fake: FakeServer, server: ServerConnection, way: str, num_tensors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "plan_buckets", partial(wire.plan_buckets, bucket_bytes=1024))
    policy = FakePolicy(1, num_tensors)
    assert len(wire.plan_buckets(policy.specs("float32"))) > num_tensors // 10
    server.send_weights(V1, policy)
    assert_has(fake, policy, V1)
    assert fake.calls == UPDATE


def test_a_group_is_used_for_every_update_until_the_server_is_another(
    fake: FakeServer, server: ServerConnection
) -> None:
    fake.probe.unlink()
    fake.shares_memory = False
    policy = FakePolicy(1)
    server.send_weights(V1, policy)
    server.send_weights(V2, policy)
    fake.restart()
    server.send_weights(V2, policy)
    assert_has(fake, policy, V2)
    first, second, third = (meeting.group for meeting in fake.rendezvous)
    assert first == second != third
    assert {meeting.backend for meeting in fake.rendezvous} == {"gloo"}
    assert {meeting.host for meeting in fake.rendezvous} == {"127.0.0.1"}, "the address that leads to the server"


def test_after_a_broken_transfer_the_workers_are_met_anew(fake: FakeServer, server: ServerConnection) -> None:
    fake.probe.unlink()
    server.send_weights(V1, FakePolicy(1))
    fake.faults[protocol.COMMIT_WEIGHTS] = ["drop"]
    with pytest.raises(ServerAway):
        server.send_weights(V2, FakePolicy(2))
    assert fake.refusing is not None
    server.send_weights(V2, FakePolicy(2))
    assert_has(fake, FakePolicy(2), V2)
    first, second, third = (meeting.group for meeting in fake.rendezvous)
    assert first == second != third


@pytest.mark.parametrize("moment", ["before the ranks meet", "in the middle"])
def test_what_goes_wrong_while_sending_is_raised_at_once(
    fake: FakeServer, server: ServerConnection, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the workers have waited long enough: here six times PATIENCE_S, in earnest ten minutes."""
    fake.probe.unlink()
    commit, join_group, fill, worker_is_done = fake.commit, wire.join_group, wire.fill, threading.Event()

    def watched_commit(request: Any) -> Any:
        try:
            return commit(request)
        finally:
            worker_is_done.set()

    def no_group(backend: str, store: Any, rank: int, *others: Any) -> Any:
        if rank == 0:
            raise KeyError("a variable")
        return join_group(backend, store, rank, *others)

    def no_third_bucket(bucket: wire.Bucket, *others: Any) -> None:
        if "t2" in bucket.names:
            raise KeyError("a variable")
        fill(bucket, *others)

    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(fake, "commit", watched_commit)
        patch.setattr(fake_server, "PATIENCE_S", 6 * PATIENCE_S)
        patch.setattr(wire, "FIND_TIMEOUT_S", 0.5)
        patch.setattr(wire, "plan_buckets", partial(wire.plan_buckets, bucket_bytes=64))
        broken = ("fill", no_third_bucket) if moment == "in the middle" else ("join_group", no_group)
        patch.setattr(wire, *broken)
        with pytest.raises(KeyError, match="a variable"):
            server.send_weights(V1, FakePolicy(1))
        assert worker_is_done.wait(6 * PATIENCE_S)
    assert time.monotonic() - start < 3 * PATIENCE_S
    server.send_weights(V2, FakePolicy(2))
    assert_has(fake, FakePolicy(2), V2)


@pytest.mark.parametrize(
    "change",
    [{"digest": "0" * 32}, {"weights": V2.model_dump()}, {"weights": {"run": "other", "version": 1}}],
    ids=["digest", "version", "run"],
)
def test_a_server_that_got_something_else_is_an_error(
    fake: FakeServer, server: ServerConnection, way: str, change: dict[str, Any]
) -> None:
    fake.answers[protocol.COMMIT_WEIGHTS] = lambda answer: answer | change
    with pytest.raises(RunError, match=rf"{fake.url} has got version . .* sent was version 1 of run run with"):
        server.send_weights(V1, FakePolicy(1))


def test_another_trainer_s_begin_makes_the_set_be_sent_again(fake: FakeServer, server: ServerConnection) -> None:
    def taken_over(answer: dict[str, Any]) -> dict[str, Any]:
        fake.begun = None
        return answer

    fake.answers[protocol.BEGIN_WEIGHTS] = taken_over
    with pytest.raises(WrongWeights, match="was not begun"):
        server.send_weights(V1, FakePolicy(1))


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o755, 0o770])
def test_a_folder_that_others_may_enter_gets_no_weights(
    fake: FakeServer, server: ServerConnection, mode: int
) -> None:
    fake.probe.parent.chmod(mode)
    server.send_weights(V1, FakePolicy(1))
    assert fake.rendezvous[0] is not None
    assert not fake.staging.exists()


@pytest.mark.parametrize("name", ["../elsewhere", "other", "/etc/passwd"])
def test_weights_are_written_beside_the_probe_and_nowhere_else(
    fake: FakeServer, server: ServerConnection, name: str
) -> None:
    place = str(fake.probe.parent / name)
    fake.answers[protocol.BEGIN_WEIGHTS] = lambda answer: answer | {"path": place}
    with pytest.raises(RunError, match=f"asks for the weights in {place}, .* not trusted"):
        server.send_weights(V1, FakePolicy(1))
    assert fake.count(protocol.COMMIT_WEIGHTS) == 0


def test_a_probe_of_another_machine_is_not_taken_for_this_one_s(
    fake: FakeServer, server: ServerConnection
) -> None:
    fake.probe.write_text("another instance")
    server.send_weights(V1, FakePolicy(1))
    assert fake.rendezvous[0] is not None
    assert not fake.staging.exists()
