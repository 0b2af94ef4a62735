"""Episodes: who waits for whom, which tokens they hold, where they end, and what became of what failed."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from itertools import pairwise
from typing import Any

import pytest

from grpo_cli.data.prompts import Prompt
from grpo_cli.episode.driver import Driver
from grpo_cli.episode.environments import environment_kind
from grpo_cli.episode.tools import tool_of
from grpo_cli.episode.world import World
from grpo_cli.errors import RunError
from grpo_cli.recipe.episode import EpisodeConfig
from grpo_cli.rollout.engine import Completion, Demand, Turn
from tests.episode.chat import chat_tokenizer
from tests.episode.scripted import Script, Scripted

QUESTION = [{"role": "user", "content": "What is 2 + 3?"}]
KEY = (7, 0, 0)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def fail(why: str) -> str:
    """Fail.

    Args:
        why: What to say.
    """
    raise ValueError(why)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Guess:
    """Says whether a guess is too low; ends once it is right."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.seen: list[str] = []
        self.seed = -1
        self.closed = False

    def reset(self, seed: int, secret: int, **columns: Any) -> str:
        self.secret, self.seed, self.seen = secret, seed, []
        return f" Guess, hint {seed % 100}."

    def respond(self, text: str) -> str | None:
        self.seen.append(text)
        return None if int(text) == self.secret else "higher" if int(text) < self.secret else "lower"

    def close(self) -> None:
        self.closed = True


def play(
    script: Script,
    *,
    tools: tuple[Any, ...] = (add,),
    environment: Any = None,
    template: str = "qwen2_5",
    limit: int = 400,
    prompts: int = 1,
    size: int = 2,
    columns: dict[str, Any] | None = None,
    **config: Any,
) -> tuple[list[list[Completion]], Scripted, World]:
    tokenizer = chat_tokenizer(template)
    kinds = {} if environment is None else {None: environment_kind(environment, None)}
    settings = EpisodeConfig(**config)
    listed = [tool_of(tool, "episode.tools") for tool in tools]
    world = World(settings, listed, kinds, tokenizer, {}, {tokenizer.eos_token_id})
    engine = Scripted(tokenizer, script)
    shown = [tool.schema for tool in listed] or None
    ids = tokenizer.apply_chat_template(
        QUESTION, tools=shown, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    given = [Prompt(index, QUESTION, list(ids), columns or {}) for index in range(prompts)]
    driver = Driver(engine, limit, world, note=NOTES.append)
    groups = driver.generate(given, [(*KEY, index) for index in range(prompts)], size)
    return groups, engine, world


NOTES: list[str] = []


@pytest.fixture(autouse=True)
def no_notes() -> None:
    NOTES.clear()


def test_the_tokens_are_those_that_were_sampled_and_what_the_template_writes_between() -> None:
    said = [call("add", a=2, b=3), "It is 5."]
    ((one, other),), engine, _ = play(lambda turn: said[turn.number])
    tokenizer = engine.tokenizer
    assert one.token_ids == other.token_ids
    assert one.messages == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}],
        },
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "assistant", "content": "It is 5."},
    ]
    assert (one.turns, one.finish_reason, one.tools.calls, one.tools.failures) == (2, "stop", 1, 0)
    rendered = tokenizer.apply_chat_template(
        QUESTION + one.messages, tools=[tool_of(add, "").schema], tokenize=True, return_dict=False
    )
    whole = engine.asked[0].token_ids + one.token_ids
    assert whole == rendered[: len(whole)]
    assert one.sampled is not None
    spoken = [token for token, sampled in zip(one.token_ids, one.sampled, strict=True) if sampled]
    eos = tokenizer.eos_token_id
    assert spoken == [
        *tokenizer(said[0], add_special_tokens=False)["input_ids"], eos,
        *tokenizer(said[1], add_special_tokens=False)["input_ids"], eos,
    ]  # fmt: skip
    assert [p == p for p in one.logprobs] == one.sampled  # NaN where nothing was sampled
    assert one.num_sampled == len(spoken)
    second = engine.asked[2]
    assert list(second.token_ids) == whole[: len(second.token_ids)]
    assert len(whole) - len(second.token_ids) == len(tokenizer(said[1], add_special_tokens=False)["input_ids"]) + 1


def test_a_later_turn_begins_with_all_that_was_read_and_said() -> None:
    (_,), engine, _ = play(lambda turn: call("add", a=1, b=turn.number) if turn.number < 3 else "done", size=2)
    by_completion: dict[int, list[Turn]] = {}
    for turn in engine.asked:
        by_completion.setdefault(turn.completion, []).append(turn)
    for turns in by_completion.values():
        assert [turn.number for turn in turns] == [0, 1, 2, 3]
        for before, after in pairwise(turns):
            assert list(after.token_ids[: len(before.token_ids)]) == list(before.token_ids)
            assert after.max_tokens < before.max_tokens
    assert engine.forgotten == {0, 1}


def test_calls_of_a_turn_run_at_the_same_time_and_are_answered_in_their_order() -> None:
    meeting = threading.Barrier(3, timeout=10)

    def meet(place: int) -> str:
        """Wait for the others.

        Args:
            place: Which call it is.
        """
        meeting.wait()
        time.sleep(0.03 * (3 - place))
        return f"place {place}"

    three = "\n".join(call("meet", place=place) for place in range(3))
    ((one,),), _, _ = play(lambda turn: three if turn.number == 0 else "ok", tools=(meet,), size=1)
    assert one.messages is not None
    assert [message["content"] for message in one.messages if message["role"] == "tool"] == [
        "place 0", "place 1", "place 2",
    ]  # fmt: skip


def test_no_episode_waits_for_another() -> None:
    released = threading.Event()

    def wait(long: bool) -> str:
        """Wait.

        Args:
            long: Until the other episode is over.
        """
        if long:
            assert released.wait(10)
        return "waited"

    def script(turn: Turn) -> str:
        if turn.number == 0:
            return call("wait", long=turn.sample == 0)
        if turn.sample == 1:
            released.set()  # said while the first still waits for its tool
        return "ok"

    (group,), _, _ = play(script, tools=(wait,))
    assert [one.finish_reason for one in group] == ["stop", "stop"]


@pytest.mark.parametrize("sleeps", [(0.0, 0.05), (0.05, 0.0)])
def test_the_episode_does_not_depend_on_the_timing(sleeps: tuple[float, float]) -> None:
    calls = iter(range(100))

    def slow(a: int) -> int:
        """Double a number, at leisure.

        Args:
            a: The number.
        """
        time.sleep(sleeps[next(calls) % 2])
        return 2 * a

    groups, engine, _ = play(
        lambda turn: call("slow", a=turn.sample) if turn.number < 2 else f"{turn.sample}", tools=(slow,), prompts=3
    )
    assert [[one.token_ids for one in group] for group in groups] == [
        [one.token_ids for one in group]
        for group in play(
            lambda turn: call("slow", a=turn.sample) if turn.number < 2 else f"{turn.sample}",
            tools=(slow,),
            prompts=3,
        )[0]
    ]
    keys = {(turn.completion, turn.number): tuple(turn.uniforms()[:4]) for turn in engine.asked}
    assert len(set(keys.values())) == len(keys), "each turn has random numbers of its own"


@pytest.mark.parametrize(
    ("said", "told", "unknown"),
    [
        (call("subtract", a=1), "there is no tool 'subtract'", 1),
        (call("add", a=1), "add needs 'b'", 0),
        ('<tool_call>\n{"name": "add", "arguments"\n</tool_call>', "cannot be read", 0),
    ],
)
def test_what_the_model_writes_wrongly_is_told_to_it(said: str, told: str, unknown: int) -> None:
    ((one,),), _, _ = play(lambda turn: said if turn.number == 0 else "sorry", size=1)
    assert one.messages is not None
    assert told in one.messages[1]["content"]
    assert one.messages[1]["content"].startswith("{'error': ")
    assert (one.tools.calls, one.tools.failures, one.tools.unknown_names) == (1, 1, unknown)
    assert (one.finish_reason, one.turns) == ("stop", 2)


def test_a_tool_that_raises_is_told_ends_the_episode_or_the_run() -> None:
    def script(turn: Turn) -> str:
        return call("fail", why="no luck") if turn.number == 0 else "sorry"

    ((one,),), _, _ = play(script, tools=(fail,), size=1)
    assert one.messages is not None
    assert one.messages[1]["content"] == "{'error': 'no luck'}"
    ((one,),), _, _ = play(script, tools=(fail,), size=1, on_error="end")
    assert (one.finish_reason, one.turns) == ("tool_failed", 1)
    with pytest.raises(RunError, match="a call of fail failed: no luck"):
        play(script, tools=(fail,), size=1, on_error="raise")


def test_a_tool_that_hangs_is_given_up_and_another_thread_takes_its_place() -> None:
    released = threading.Event()

    def hang() -> str:
        """Hang."""
        released.wait(20)
        return "late"

    def script(turn: Turn) -> str:
        return call("hang") + call("add", a=1, b=1) if turn.number < 2 else "ok"

    try:
        ((one,),), _, _ = play(script, tools=(hang, add), size=1, timeout_s=0.1, workers=1)
    finally:
        released.set()
    assert one.messages is not None
    contents = [message["content"] for message in one.messages if message["role"] == "tool"]
    assert contents == ["{'error': 'no answer within 0.1 s'}", "2"] * 2
    assert one.tools.timeouts == 2


class Stuck:
    """An environment of which a method hangs, beside a tool that does."""

    released = threading.Event()

    def reset(self, **columns: Any) -> None: ...

    def stick(self) -> str:
        """Hang."""
        self.released.wait(20)
        return "late"


def test_only_a_call_that_hangs_in_an_environment_keeps_others_out_of_it() -> None:
    def hang() -> str:
        """Hang."""
        Stuck.released.wait(20)
        return "late"

    try:
        for name, is_lost in (("hang", False), ("stick", True)):
            ((one,),), _, _ = play(
                lambda turn, name=name: call(name) if turn.number == 0 else "ok",
                tools=(hang,), environment=Stuck, size=1, timeout_s=0.1,
            )  # fmt: skip
            assert one.tools.timeouts == 1
            assert (one.environment is None) == is_lost
    finally:
        Stuck.released.set()


def test_async_tools_share_an_event_loop() -> None:
    loops: set[int] = set()

    async def look(a: int) -> int:
        """Look.

        Args:
            a: Where.
        """
        loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(0)
        return a

    ((one,),), _, _ = play(lambda turn: call("look", a=3) if turn.number < 3 else "ok", tools=(look,), size=1)
    assert one.tools.failures == 0
    assert len(loops) == 1


def test_a_long_result_is_cut_with_a_note() -> None:
    def much() -> str:
        """Say much."""
        return "word " * 500

    ((one,),), engine, _ = play(
        lambda turn: call("much") if turn.number == 0 else "ok", tools=(much,), size=1, max_result_tokens=40
    )
    assert one.messages is not None
    content = one.messages[1]["content"]
    assert content.startswith("word word")
    assert content.endswith("tokens is left out]")
    assert len(engine.tokenizer(content)["input_ids"]) <= 41


def test_the_finish_reason_says_which_limit_it_was() -> None:
    ((one,),), _, _ = play(lambda turn: call("add", a=1, b=1), size=1, max_turns=3)
    assert (one.finish_reason, one.turns, one.tools.calls) == ("max_turns", 3, 2)
    ((one,),), _, _ = play(lambda turn: "long " * 100, size=1, limit=20)
    assert (one.finish_reason, len(one.token_ids)) == ("length", 20)
    # The answer leaves no room for another token: it is not read.
    said = call("add", a=1, b=1)
    length = len(chat_tokenizer("qwen2_5")(said)["input_ids"])
    ((one,),), _, _ = play(lambda turn: said, size=1, limit=length + 5)
    assert (one.finish_reason, one.turns) == ("length", 1)
    assert one.sampled is None


def test_an_environment_answers_and_ends_an_episode_and_begins_alike_for_a_group() -> None:
    (group,), engine, _ = play(
        lambda turn: str(3 + turn.number), tools=(), environment=Guess, size=3, columns={"secret": 5}
    )
    assert [one.turns for one in group] == [3, 3, 3]
    assert group[0].messages is not None
    assert [m["content"] for m in group[0].messages] == ["3", "higher", "4", "higher", "5"]
    environments = [one.environment for one in group]
    assert len({id(one) for one in environments}) == 3
    assert len({one.seed for one in environments}) == 1
    assert all(one.seen == ["3", "4", "5"] for one in environments)
    assert group[0].prompt is not None
    assert group[0].prompt.content[-1]["content"].startswith("What is 2 + 3? Guess, hint ")
    assert len({turn.group for turn in engine.asked[:3]}) == 1, "their prompt is computed once"


def test_environments_are_made_once_reset_for_the_next_rollout_and_closed_at_the_end() -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    Guess.made = 0
    kinds = {None: environment_kind(Guess, None)}
    world = World(EpisodeConfig(), [], kinds, tokenizer, {}, {tokenizer.eos_token_id})
    driver = Driver(Scripted(tokenizer, lambda turn: "5"), 100, world)
    prompt = Prompt(0, QUESTION, [1, 2, 3], {"secret": 5})
    seen: set[int] = set()
    for step in range(3):
        (group,) = driver.generate([prompt], [(7, 0, step, 0)], 2)
        seen |= {id(one.environment) for one in group}
    assert Guess.made == 1 + 2  # one shows what it is
    assert len(seen) == 2
    environments = [one.environment for one in group]
    driver.close()
    assert all(one.closed for one in environments)


class Broken:
    """Cannot be reset, the first time or always."""

    resets = 0
    failures = 1

    def reset(self, **columns: Any) -> None:
        type(self).resets += 1
        if type(self).resets <= self.failures:
            raise OSError("no board")

    def respond(self, text: str) -> None:
        return None


@pytest.mark.parametrize(("failures", "reason"), [(1, "stop"), (99, "lost")])
def test_a_reset_that_fails_is_tried_again_and_then_the_group_is_left_out(
    failures: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "resets", 0)
    monkeypatch.setattr(Broken, "failures", failures)
    (group,), _, _ = play(lambda turn: "ok", tools=(), environment=Broken)
    assert [one.finish_reason for one in group] == [reason] * 2
    assert len(NOTES) == (failures == 99)
    if NOTES:
        assert "a group is left out: its environment could not be reset" in NOTES[0]
        assert "no board" in NOTES[0]


def test_a_prompt_that_an_environment_makes_too_long_leaves_its_group_out() -> None:
    for limit, reason in ((1000, "stop"), (20, "lost")):
        tokenizer = chat_tokenizer("qwen2_5")
        kinds = {None: environment_kind(Guess, None)}
        world = World(EpisodeConfig(), [], kinds, tokenizer, {}, {tokenizer.eos_token_id}, limit)
        driver = Driver(Scripted(tokenizer, lambda turn: "5"), 100, world, NOTES.append)
        ((one, _),) = driver.generate([Prompt(0, QUESTION, [1, 2], {"secret": 5})], [KEY], 2)
        assert one.finish_reason == reason
    assert len(NOTES) == 1
    assert "data.max_prompt_tokens is 20" in NOTES[0]


def test_a_rewritten_history_makes_a_turn_a_row_of_its_own() -> None:
    """Qwen 3 drops the thoughts of earlier turns once a user speaks again."""

    def script(turn: Turn) -> str:
        return f"<think>\nhm {turn.number}\n</think>\n\n{3 + turn.number}"

    class Bare(Guess):
        def respond(self, text: str) -> str | None:
            return super().respond(text.rsplit("</think>", 1)[-1])

    ((one,),), engine, _ = play(
        script, tools=(), environment=Bare, template="qwen3", size=1, columns={"secret": 5}
    )
    prompt = one.prompt
    assert prompt is not None
    rows = one.rows(prompt)
    assert len(rows) == 3
    for row, turn in zip(rows, engine.asked, strict=True):
        assert row.prompt_ids == list(turn.token_ids)
        assert row.sampled is not None or row.token_ids
    assert "hm 0" not in engine.tokenizer.decode(rows[1].prompt_ids)
    assert one.num_sampled == sum(len(row.token_ids) for row in rows)


def test_what_a_rollout_will_ask_for_is_said_before_its_environments_are_reset() -> None:
    """The embedded engine makes its memory once, and resets may end one after the other."""
    _, engine, _ = play(lambda turn: "5", tools=(), environment=Guess, size=3, prompts=2, columns={"secret": 5})
    assert engine.demands == [Demand(completions=6, groups=6, group_size=3)]
    _, engine, _ = play(lambda turn: "5", size=3, prompts=2)
    assert engine.demands == [Demand(completions=6, groups=2, group_size=3)]


class Wordless(Exception):
    def __str__(self) -> str:
        raise OSError("no words")


class Nameless:
    def __str__(self) -> str:
        raise OSError("no name")


@pytest.mark.parametrize("name", ["raises", "returns"])
def test_what_has_no_text_is_told_too(name: str) -> None:
    def raises() -> str:
        """Raise what cannot be told."""
        raise Wordless

    def returns() -> Nameless:
        """Give what cannot be told."""
        return Nameless()

    returns.__annotations__["return"] = str
    ((one,),), _, _ = play(lambda turn: call(name) if turn.number == 0 else "ok", tools=(raises, returns), size=1)
    assert one.messages is not None
    told = "Wordless" if name == "raises" else "the result has no text: no name"
    assert one.messages[1]["content"] == str({"error": told})
    assert one.finish_reason == "stop"


class Late:
    """Reset after a while; ends in the middle of everything if told to."""

    async def reset(self, **columns: Any) -> None:
        await asyncio.sleep(0.2 if columns["secret"] else 0)

    def respond(self, text: str) -> None:
        raise ValueError("over")


def test_environments_of_groups_that_have_not_begun_are_given_back() -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    kinds = {None: environment_kind(Late, None)}
    world = World(EpisodeConfig(on_error="raise"), [], kinds, tokenizer, {}, {tokenizer.eos_token_id})
    driver = Driver(Scripted(tokenizer, lambda turn: "5"), 100, world)
    prompts = [Prompt(index, QUESTION, [1, 2, 3], {"secret": index}) for index in range(2)]
    with pytest.raises(RunError, match="a call of respond failed: over"):
        driver.generate(prompts, [(*KEY, 0), (*KEY, 1)], 2)
    deadline = time.monotonic() + 5
    while len(world.pool._idle[None]) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(world.pool._idle[None]) == 2
