"""Servers come, go, hang and lie; every completion that is used was made by the weights that were meant."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.errors import RunError, ServerLost, ServerNeverReached, UserError
from grpo_cli.recipe.sampling import Sampling
from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.engine import Completion
from grpo_cli.rollout.server.attempts import MAX_ATTEMPTS
from grpo_cli.rollout.server.connection import ServerConnection
from grpo_cli.rollout.server.engine import ServerEngine, generate_request
from grpo_cli.serve import protocol, wire
from grpo_cli.serve.protocol import GenerateRequest, Weights
from tests.conftest import byte_tokenizer
from tests.rollout.driving import Driven, first_turns
from tests.rollout.server.fake_server import PATIENCE_S, FakePolicy, FakeServer, tokens_of

CONFIG = GenerationConfig(num_generations=4, max_completion_tokens=8)
PROMPTS = [[10 + i, 20, 30] for i in range(12)]
KEYS = [(0, 0, 5, i) for i in range(12)]
SIZE = 4


@pytest.fixture(autouse=True)
def short_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is silence while a server is at work: here no longer than at other times."""
    monkeypatch.setattr(protocol, "HEARTBEAT_S", 0.05)


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[list[FakeServer]]:
    fakes = [FakeServer(tmp_path) for _ in range(2)]
    yield fakes
    for fake in fakes:
        fake.die()


@pytest.fixture
def fake(fakes: list[FakeServer]) -> FakeServer:
    return fakes[0]


@pytest.fixture
def policy() -> FakePolicy:
    return FakePolicy(0)


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def connect(policy: FakePolicy, notes: list[str]) -> Iterator[Callable[..., ServerEngine]]:
    engines: list[ServerEngine] = []

    def make(*fakes: FakeServer, timeout_s: float = PATIENCE_S, config: GenerationConfig = CONFIG) -> ServerEngine:
        servers = [ServerConnection(fake.url, None, timeout_s) for fake in fakes]
        weights: Any = policy
        engines.append(ServerEngine(servers, weights, byte_tokenizer(), config, {256}, note=notes.append))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def update(engine: ServerEngine, version: int) -> int:
    """As a training step does: the policy moves on, and its weights are sent."""
    engine.policy.set(version)  # type: ignore[attr-defined]
    return engine.update_weights(version)


def generate(engine: ServerEngine, count: int = 12, **kwargs: Any) -> list[list[Completion]]:
    return Driven(engine).generate(PROMPTS[:count], KEYS[:count], SIZE, **kwargs)


def assert_from(groups: list[list[Completion]], version: int) -> None:
    """That each group is the one of its prompt, made by the weights of this version."""
    for index, group in enumerate(groups):
        turns = first_turns(PROMPTS[index], KEYS[index], SIZE, CONFIG.max_completion_tokens)
        asked = generate_request(CONFIG, {256}, turns)
        assert [one.token_ids for one in group] == [tokens_of(asked, version, i) for i in range(SIZE)]


def prompts_of(fake: FakeServer) -> list[int]:
    return [request.token_ids[0] for request in fake.generated]


def test_a_request_says_what_the_recipe_says() -> None:
    config = GenerationConfig(
        max_completion_tokens=9,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        stop=["\n"],
    )
    weights = Weights(run="r", version=2)
    asked = generate_request(config, {300, 2, 10}, first_turns((5, 6, 7), (1, 0, 4), 8, 9), weights)
    assert asked.model_dump(exclude={"seed"}) == {
        "token_ids": [5, 6, 7], "n": 8, "max_completion_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
        "min_p": 0.1, "repetition_penalty": 1.2, "stop": ["\n"], "stop_token_ids": [2, 10, 300],
        "weights": {"run": "r", "version": 2},
    }  # fmt: skip
    other = generate_request(Sampling(temperature=0.5), {256}, first_turns((5,), (1, 0, 4), 2, 9))
    assert asked.seed == other.seed


def test_groups_come_back_in_the_order_of_their_prompts(fake: FakeServer, connect: Any) -> None:
    engine = connect(fake)
    update(engine, 3)
    groups = generate(engine)
    assert_from(groups, 3)
    assert groups[0][0].logprobs == [-0.5, -0.25]
    assert sorted(prompts_of(fake)) == [prompt[0] for prompt in PROMPTS], "each was generated once"


def test_the_same_keys_give_the_same_completions(fakes: list[FakeServer], connect: Any) -> None:
    results = []
    for servers in ([fakes[0]], [fakes[1]], fakes):
        engine = connect(*servers)
        update(engine, 3)
        results.append(generate(engine))
    assert results[0] == results[1] == results[2]


def test_weights_are_sent_once_for_each_version(fake: FakeServer, connect: Any) -> None:
    engine = connect(fake)
    assert update(engine, 0) > 0
    assert engine.update_weights(0) == 0
    assert update(engine, 1) > 0
    assert fake.count(protocol.COMMIT_WEIGHTS) == 2
    assert_from(generate(engine), 1)


def test_two_trainers_at_one_server_are_not_taken_for_each_other(
    fake: FakeServer, connect: Any, policy: FakePolicy
) -> None:
    first, second = connect(fake), connect(fake)
    update(first, 7)
    update(second, 7)
    assert fake.count(protocol.COMMIT_WEIGHTS) == 2
    assert fake.weights == Weights(run=second.run, version=7)
    assert_from(generate(first), 7)
    assert fake.weights == Weights(run=first.run, version=7), "what was taken away is sent again"


@pytest.mark.parametrize("num_tensors", [1, 200])
def test_an_update_takes_four_calls_however_many_tensors_there_are(
    fake: FakeServer, connect: Any, num_tensors: int
) -> None:
    engine = connect(fake)
    engine.policy = FakePolicy(0, num_tensors)
    update(engine, 1)
    assert len(fake.loaded) == num_tensors + 1
    assert len(fake.calls) == 4


@pytest.mark.parametrize("fault", [500, 503, "drop", "lose", 409, "restart", "garbage"])
@pytest.mark.parametrize("path", [protocol.INFO, protocol.BEGIN_WEIGHTS, protocol.COMMIT_WEIGHTS])
def test_an_update_outlasts_a_moment_s_fault(
    fake: FakeServer, connect: Any, notes: list[str], path: str, fault: Any
) -> None:
    engine = connect(fake)
    if path != protocol.INFO or fault != 409:
        fake.faults[path] = [fault]
    update(engine, 0)
    fake.faults[path] = [fault]
    update(engine, 1)
    assert (fake.weights, fake.refusing) == (engine.weights, None)
    assert_from(generate(engine), 1)


@pytest.mark.parametrize(
    ("fault", "times"),
    [*product([500, 503, "drop", "lose", 409, "restart", "garbage"], [1, MAX_ATTEMPTS - 1]), ("silent", 1)],
)
def test_a_prompt_outlasts_a_moment_s_faults(fake: FakeServer, connect: Any, fault: Any, times: int) -> None:
    engine = connect(fake, timeout_s=0.5 if fault == "silent" else PATIENCE_S)
    update(engine, 2)
    fake.faults[protocol.GENERATE] = [fault] * times
    assert_from(generate(engine, 1), 2)
    assert fake.count(protocol.GENERATE) == times + 1


@pytest.mark.parametrize("fault", [500, 503, 409, "restart"])
def test_a_prompt_that_fails_again_and_again_ends_the_run(fake: FakeServer, connect: Any, fault: Any) -> None:
    engine = connect(fake)
    update(engine, 2)
    fake.always[protocol.GENERATE] = fault
    with pytest.raises(RunError, match=rf"a prompt failed {MAX_ATTEMPTS} times: {fake.url}"):
        generate(engine, 1)
    assert fake.count(protocol.GENERATE) == MAX_ATTEMPTS


@pytest.mark.parametrize("fault", ["drop", 502])
def test_a_prompt_whose_link_breaks_again_and_again_ends_the_run_with_a_checkpoint(
    fake: FakeServer, connect: Any, notes: list[str], fault: Any
) -> None:
    engine = connect(fake, timeout_s=2.0)
    update(engine, 2)
    began, fake.always[protocol.GENERATE] = time.monotonic(), fault
    with pytest.raises(ServerLost, match=f"a prompt failed .* times: {fake.url}"):
        generate(engine, 1)
    assert time.monotonic() > began + 2.0, "attempts alone would be used up in a moment"
    assert fake.count(protocol.GENERATE) >= MAX_ATTEMPTS
    assert len([note for note in notes if "asking again" in note]) == 1


@pytest.mark.parametrize("fault", ["drop", 500])
@pytest.mark.parametrize("path", [protocol.BEGIN_WEIGHTS, protocol.COMMIT_WEIGHTS])
def test_weights_whose_link_breaks_again_and_again(fake: FakeServer, connect: Any, path: str, fault: Any) -> None:
    """Of the user if none ever arrived, as where the server cannot reach the trainer; else the server is lost."""
    fake.always[path] = "drop"
    with pytest.raises(ServerNeverReached, match=r"^generation\.server: the weights could not be sent in "):
        update(connect(fake, timeout_s=0.3), 2)
    fake.always.clear()
    engine = connect(fake, timeout_s=0.3)
    update(engine, 2)
    fake.always[path] = fault
    with pytest.raises(ServerLost, match=r"^the weights could not be sent in ") as caught:
        update(engine, 3)
    assert not isinstance(caught.value, ServerNeverReached)


@pytest.mark.parametrize("path", [protocol.BEGIN_WEIGHTS, protocol.COMMIT_WEIGHTS])
@pytest.mark.parametrize("fault", [500, 409])
def test_weights_that_are_never_taken_end_the_run(
    fake: FakeServer, connect: Any, notes: list[str], path: str, fault: Any
) -> None:
    engine = connect(fake)
    fake.always[path] = fault
    with pytest.raises(RunError, match=rf"weights could not be sent in {MAX_ATTEMPTS} attempts: {fake.url}"):
        update(engine, 2)
    assert fake.count(path) == MAX_ATTEMPTS
    assert len(notes) == MAX_ATTEMPTS
    assert all("sending the weights again" in note for note in notes)


@pytest.mark.parametrize("fault", [400, 404, 422, "html", "other json"])
def test_what_repeating_does_not_change_is_not_repeated(fake: FakeServer, connect: Any, fault: Any) -> None:
    engine = connect(fake)
    update(engine, 2)
    fake.faults[protocol.GENERATE] = [fault]
    with pytest.raises(RunError, match=fake.url):
        generate(engine, 1)
    assert fake.count(protocol.GENERATE) == 1


def test_a_server_that_started_anew_gets_the_weights_before_it_generates(fake: FakeServer, connect: Any) -> None:
    engine = connect(fake)
    update(engine, 4)
    fake.restart()
    assert_from(generate(engine), 4)
    assert fake.count(protocol.COMMIT_WEIGHTS) == 2, "once, however many prompts were refused"
    assert fake.weights == engine.weights


@pytest.mark.parametrize("when", ["update", "generate"])
def test_a_server_that_refuses_gets_a_whole_set_even_of_the_weights_that_it_names(
    fake: FakeServer, connect: Any, when: str
) -> None:
    engine = connect(fake)
    update(engine, 4)
    fake.refusing = "another trainer's weights did not arrive whole"
    if when == "update":
        assert engine.update_weights(4) > 0
    assert_from(generate(engine), 4)
    assert fake.count(protocol.COMMIT_WEIGHTS) == 2


def test_what_a_server_without_our_weights_generated_is_thrown_away(fake: FakeServer, connect: Any) -> None:
    """A server that has lost its weights, says so nowhere, and generates."""
    engine = connect(fake)
    update(engine, 4)
    lies = [True]

    def other(answer: dict[str, Any]) -> dict[str, Any]:
        if "completions" not in answer or not lies:
            return answer
        lies.pop()
        wrong = [part | {"token_ids": [99, 99]} for part in answer["completions"]]
        return answer | {"weights": None, "completions": wrong}

    fake.answers[protocol.GENERATE] = other
    assert_from(generate(engine), 4)
    assert lies == []


def test_a_server_that_dies_and_comes_back_meanwhile_finishes_the_prompts(fake: FakeServer, connect: Any) -> None:
    engine = connect(fake)
    update(engine, 6)
    served, once = threading.Semaphore(3), threading.Lock()
    again = threading.Thread(target=fake.restart)

    def before(request: GenerateRequest) -> None:
        if not served.acquire(blocking=False) and once.acquire(blocking=False):
            again.start()

    fake.before_generate = before
    first = fake.instance
    assert_from(generate(engine), 6)
    again.join(PATIENCE_S)
    assert fake.instance != first
    assert set(prompts_of(fake)) == {prompt[0] for prompt in PROMPTS}


def test_one_of_two_servers_may_start_anew_meanwhile(fakes: list[FakeServer], connect: Any) -> None:
    engine = connect(*fakes)
    update(engine, 6)
    fakes[1].faults[protocol.GENERATE] = [None, "restart"]
    assert_from(generate(engine), 6)
    update(engine, 7)
    assert_from(generate(engine), 7)
    assert fakes[0].weights == fakes[1].weights == engine.weights


def test_a_server_that_is_never_reached_is_an_error_of_the_user(
    fakes: list[FakeServer], connect: Any, notes: list[str]
) -> None:
    fakes[1].die()
    engine = connect(*fakes, timeout_s=0.15)
    with pytest.raises(
        ServerNeverReached, match=rf"^generation\.server: {fakes[1].url} .*is grpo serve running there\?"
    ):
        update(engine, 0)
    assert notes == [f"waiting up to 0.15 s for {fakes[1].url}"]


@pytest.mark.parametrize("fault", ["dead", 503, "silent"])
@pytest.mark.parametrize("when", ["update", "generate"])
def test_a_server_that_stays_away_is_lost(fake: FakeServer, connect: Any, fault: Any, when: str) -> None:
    engine = connect(fake, timeout_s=0.3)
    update(engine, 0)
    if fault == "dead":
        fake.die()
    else:
        fake.always = dict.fromkeys([protocol.INFO, protocol.GENERATE], fault)
    with pytest.raises(ServerLost, match=rf"{re.escape(fake.url)}.* and for 0\.3 s before"):
        update(engine, 1) if when == "update" else generate(engine)


def test_one_lost_server_of_two_is_lost(fakes: list[FakeServer], connect: Any) -> None:
    fakes[0].max_num_seqs = SIZE
    engine = connect(*fakes, timeout_s=0.3)
    update(engine, 0)
    fakes[1].die()
    over = threading.Event()  # until then the other server is at its first prompt
    fakes[0].before_generate = lambda request: over.wait(PATIENCE_S)
    with pytest.raises(ServerLost, match=fakes[1].url):
        generate(engine)
    over.set()


@pytest.mark.parametrize("when", ["update", "generate"])
def test_a_server_that_wants_another_key_is_an_error_of_the_user(
    fake: FakeServer, connect: Any, when: str
) -> None:
    engine = connect(fake)
    if when == "generate":
        update(engine, 0)
    fake.key = "correct-horse-battery-staple"
    with pytest.raises(UserError, match=r"generation\.server\.api_key_file"):
        update(engine, 1) if when == "update" else generate(engine)
    assert fake.calls.count(protocol.COMMIT_WEIGHTS) == (when == "generate")


def test_two_servers_share_the_prompts_and_both_get_every_update(fakes: list[FakeServer], connect: Any) -> None:
    for fake in fakes:
        fake.max_num_seqs = SIZE
    engine = connect(*fakes)
    moved = wire.total_bytes(wire.plan_buckets(engine.policy.specs("float32")))
    for version in range(3):
        assert update(engine, version) == 2 * moved
        both = threading.Barrier(2)
        firsts = [threading.Semaphore(1) for _ in fakes]

        def meet(first: threading.Semaphore, both: threading.Barrier = both) -> Callable[[GenerateRequest], Any]:
            return lambda request: first.acquire(blocking=False) and both.wait(PATIENCE_S)

        for fake, first in zip(fakes, firsts, strict=True):
            fake.before_generate, fake.generated = meet(first), []
        assert_from(generate(engine), version)
        assert all(prompts_of(fake) for fake in fakes)
        assert sorted(prompts_of(fakes[0]) + prompts_of(fakes[1])) == [prompt[0] for prompt in PROMPTS]
    assert [fake.count(protocol.COMMIT_WEIGHTS) for fake in fakes] == [3, 3]


def test_a_slow_server_gets_fewer_prompts(fakes: list[FakeServer], connect: Any) -> None:
    slow, fast = fakes
    for fake in fakes:
        fake.max_num_seqs = SIZE  # one prompt at a time
    engine = connect(slow, fast)
    update(engine, 1)
    finished = threading.Event()

    def work(request: GenerateRequest) -> None:
        if len(fast.generated) + 2 >= len(PROMPTS):
            finished.set()

    fast.before_generate = work
    slow.before_generate = lambda request: finished.wait(PATIENCE_S)
    assert_from(generate(engine), 1)
    assert len(slow.generated) <= 2
    assert len(fast.generated) >= len(PROMPTS) - 2


@pytest.mark.parametrize(("max_num_seqs", "expected"), [(SIZE, 1), (2 * SIZE + 1, 2), (3 * SIZE, 3), (1, 1)])
def test_a_server_is_given_as_many_prompts_at_a_time_as_it_holds(
    fake: FakeServer, connect: Any, max_num_seqs: int, expected: int
) -> None:
    fake.max_num_seqs = max_num_seqs
    engine = connect(fake)
    update(engine, 1)
    # Each request waits until as many are there as should be; one more at a time would be counted.
    together, now, most = threading.Barrier(expected), [0], [0]
    lock = threading.Lock()

    def count(request: GenerateRequest) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(PATIENCE_S)
        with lock:
            now[0] -= 1

    fake.before_generate = count
    assert_from(generate(engine, 6), 1)
    assert most[0] == expected


def test_each_group_is_reported_once_from_the_calling_thread(fakes: list[FakeServer], connect: Any) -> None:
    engine = connect(*fakes)
    update(engine, 1)
    fakes[0].faults[protocol.GENERATE] = ["drop", 409]
    reported: list[tuple[int, list[Completion], threading.Thread]] = []
    groups = generate(
        engine, on_group=lambda index, group: reported.append((index, group, threading.current_thread()))
    )
    assert sorted(index for index, _, _ in reported) == list(range(12))
    assert all(group == groups[index] for index, group, _ in reported)
    assert {thread for _, _, thread in reported} == {threading.current_thread()}


def test_a_group_is_reported_while_others_are_generated(fake: FakeServer, connect: Any) -> None:
    engine = connect(fake)
    update(engine, 1)
    seen = threading.Event()
    first = PROMPTS[0][0]
    fake.before_generate = lambda request: request.token_ids[0] == first or seen.wait(PATIENCE_S)
    reported: list[int] = []

    def report(index: int, group: list[Completion]) -> None:
        reported.append(index)
        seen.set()

    generate(engine, on_group=report)
    assert reported[0] == 0
    assert len(reported) == 12


def test_what_a_report_raises_ends_the_generation(fake: FakeServer, connect: Any) -> None:
    fake.max_num_seqs = SIZE
    engine = connect(fake)
    update(engine, 1)
    raised = threading.Event()
    fake.before_generate = lambda request: not fake.generated or raised.wait(PATIENCE_S)

    def fail(index: int, group: list[Completion]) -> None:
        raise KeyError("reward")

    with pytest.raises(KeyError, match="reward"):
        generate(engine, on_group=fail)
    workers = [thread for thread in threading.enumerate() if "_take_work" in thread.name]
    raised.set()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert fake.count(protocol.GENERATE) <= 2, "the one that failed, and the one that was under way"
    update(engine, 2)
    assert_from(generate(engine), 2)


@pytest.mark.parametrize("short", [0, 1])
def test_a_prompt_that_a_server_cannot_take_is_named_before_anything_is_generated(
    fakes: list[FakeServer], connect: Any, short: int
) -> None:
    fakes[short].max_model_len = 10
    engine = connect(*fakes)
    update(engine, 1)
    with pytest.raises(UserError, match=rf"a prompt of 3 tokens .*\(8\) exceed .* 10 of {fakes[short].url}"):
        generate(engine)
    assert fakes[0].generated == fakes[1].generated == []
    fakes[short].max_model_len = 11
    update(engine, 2)
    assert_from(generate(engine), 2)


def test_nothing_is_generated_before_weights_were_sent(fake: FakeServer, connect: Any) -> None:
    with pytest.raises(AssertionError, match="update_weights comes before stream"):
        generate(connect(fake))


class Spawned:
    """A server of the trainer's own, which is started when it is asked for."""

    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake
        self.started, self.checked, self.generated, self.stopped = 0, 0, 0, 0

    def has_generated(self) -> None:
        self.generated += 1

    def ensure_running(self) -> None:
        if self.fake._http is None:
            self.started += 1
            self.fake.rise()

    def check(self) -> None:
        self.checked += 1

    def stop(self) -> None:
        self.stopped += 1


def test_a_server_of_one_s_own_is_started_again_and_stopped(
    fake: FakeServer, policy: FakePolicy, notes: list[str]
) -> None:
    fake.die()
    spawned = Spawned(fake)
    engine = ServerEngine(
        [ServerConnection(fake.url, None, PATIENCE_S)], policy, byte_tokenizer(), CONFIG, {256},
        spawned=spawned, note=notes.append,
    )  # type: ignore[arg-type]  # fmt: skip
    update(engine, 3)
    assert spawned.started == 1
    assert spawned.checked >= 1
    assert spawned.generated == 0, "taking weights is not generating"
    fake.die()
    assert_from(generate(engine), 3)
    assert spawned.started == 2
    assert spawned.generated == len(fake.generated) > 0
    engine.close()
    assert spawned.stopped == 1


@pytest.mark.parametrize("call", [lambda engine: update(engine, 1), lambda engine: generate(engine)])
def test_a_server_of_one_s_own_that_ends_again_and_again_is_lost(
    fake: FakeServer, policy: FakePolicy, call: Any
) -> None:
    spawned = Spawned(fake)
    engine = ServerEngine(
        [ServerConnection(fake.url, None, PATIENCE_S)], policy, byte_tokenizer(), CONFIG, {256}, spawned=spawned
    )  # type: ignore[arg-type]
    update(engine, 0)
    fake.die()

    def given_up() -> None:
        raise ServerLost("the rollout server ended 3 times in a row")

    spawned.ensure_running = given_up  # type: ignore[method-assign]
    with pytest.raises(ServerLost, match="3 times in a row"):
        call(engine)
    engine.close()


def test_a_server_of_one_s_own_that_ended_is_not_waited_for(fake: FakeServer, policy: FakePolicy) -> None:
    fake.die()
    spawned = Spawned(fake)

    def ended() -> None:
        raise RunError("the rollout server ended with code 1")

    spawned.ensure_running = lambda: None  # type: ignore[method-assign]
    spawned.check = ended  # type: ignore[method-assign]
    engine = ServerEngine(
        [ServerConnection(fake.url, None, PATIENCE_S)], policy, byte_tokenizer(), CONFIG, {256}, spawned=spawned
    )  # type: ignore[arg-type]
    with pytest.raises(RunError, match="ended with code 1"):
        update(engine, 0)
    engine.close()
