"""What completions are played in: tools, environments, and the chat template that shows them to the policy."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from grpo_cli.data.prompts import Prompt
from grpo_cli.episode.calls import ParsedTurn, TurnParser, result_text
from grpo_cli.episode.environments import COLUMN, EnvironmentKind
from grpo_cli.episode.episode import Episode, Message, Start
from grpo_cli.episode.pool import EnvironmentPool
from grpo_cli.episode.template import EpisodeTemplate
from grpo_cli.episode.tools import Tool, by_name
from grpo_cli.episode.workers import Call, CallTimeout, Workers
from grpo_cli.errors import RunError, UserError
from grpo_cli.recipe.episode import EpisodeConfig
from grpo_cli.rollout.engine import NO_USE, SampleKey, ToolUse

CUT = "\n[cut: the rest of {count} tokens is left out]"


RESET_ATTEMPTS = 2


@dataclass(frozen=True)
class Reset:
    """An environment that was reset, if there are any."""

    kind: EnvironmentKind | None = None
    instance: Any = None
    said: Any = None
    """What `reset` returned."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """What became of a call."""

    value: Any = None
    error: str | None = None
    """Why there is no value."""
    seconds: float = 0.0
    hangs: bool = False


@dataclass(frozen=True)
class Answer:
    """What a turn was answered."""

    messages: list[Message]
    """Without any, the episode is over."""
    use: ToolUse = NO_USE
    failure: str | None = None
    """Of the first call that failed."""
    hangs: bool = False
    """A call that was given up is still at work in the environment."""


class World:
    """The tools and environments of a run.

    Args:
        config: the recipe's `episode`.
        tools: of `episode.tools`.
        kinds: the environments by name.
        tokenizer: of the policy.
        template_kwargs: passed on to its chat template.
        end_ids: tokens that end a turn.
        max_prompt_tokens: of a prompt with what an environment says; no limit if None.
    """

    def __init__(
        self,
        config: EpisodeConfig,
        tools: Sequence[Tool],
        kinds: Mapping[str | None, EnvironmentKind],
        tokenizer: Any,
        template_kwargs: Mapping[str, Any],
        end_ids: set[int],
        max_prompt_tokens: int | None = None,
    ) -> None:
        self.config = config
        self._max_prompt_tokens = max_prompt_tokens
        self.pool = EnvironmentPool(kinds)
        self.workers = Workers(config.workers, config.timeout_s)
        self._template = EpisodeTemplate(tokenizer, template_kwargs)
        self._parser = TurnParser(tokenizer)
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._kinds = dict(kinds)
        self._tools: dict[str | None, dict[str, Tool]] = {
            name: by_name([*tools, *kind.tools], "episode.tools") for name, kind in kinds.items()
        } or {None: by_name(tools, "episode.tools")}

    @property
    def has_environments(self) -> bool:
        return bool(self._kinds)

    def reset(self, prompt: Prompt, key: SampleKey) -> Future[Reset]:
        """Have an environment reset for an episode, if there are any.

        The same key gives the same seed, so the members of a group begin alike. What fails is tried once more.
        """
        reset: Future[Reset] = Future()
        if self._kinds:
            self._attempt(partial(self._reset, prompt, key), reset, attempts=RESET_ATTEMPTS)
        else:
            reset.set_result(Reset())
        return reset

    def _attempt(self, call: Call, reset: Future[Reset], attempts: int) -> None:
        def ended(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                reset.set_result(done.result())
            elif attempts > 1 and not isinstance(error, UserError):
                self._attempt(call, reset, attempts - 1)
            else:
                reset.set_exception(error)

        self.workers.submit(call).add_done_callback(ended)

    def _reset(self, prompt: Prompt, key: SampleKey) -> Any:
        """A Reset, or an awaitable of one."""
        name = None if None in self._kinds else prompt.columns.get(COLUMN)
        kind, instance = self.pool.kind(name), self.pool.take(name)
        seed = int(np.random.SeedSequence(list(key)).generate_state(1)[0])
        began = time.monotonic()
        try:
            said = instance.reset(**kind.reset_arguments(prompt.content, prompt.columns, seed))
        except BaseException:
            self.pool.discard(name, instance)
            raise

        async def awaited() -> Reset:
            try:
                return Reset(kind, instance, await said, time.monotonic() - began)
            except BaseException:  # it is cancelled where it takes too long
                self.pool.discard(name, instance)
                raise

        return awaited() if inspect.isawaitable(said) else Reset(kind, instance, said, time.monotonic() - began)

    def start(self, prompt: Prompt, reset: Reset) -> Start:
        """What an episode begins with: the prompt, with what the environment says and its tools.

        Raises:
            RunError: the environment says something that is no text.
        """
        kind = reset.kind
        tools = self._tools[kind.name if kind else None]
        if kind is None or (reset.said is None and not kind.tools):
            return Start(prompt, tools, kind, reset.instance, reset.seconds)
        content = prompt.content
        assert not isinstance(content, str)  # episodes need chats
        if reset.said is not None:
            if not isinstance(reset.said, str):
                what = f"reset returned {reset.said!r:.100}, which is neither a text nor None"
                raise RunError(f"environment {kind.class_name}: {what}")
            last = content[-1]
            said: Any = reset.said
            if not isinstance(last["content"], str):
                said = [{"type": "text", "text": said}]
            content = [*content[:-1], {**last, "content": last["content"] + said}]
        token_ids = self._template.prompt_ids(content, list(tools.values()))
        told = replace(prompt, content=content, token_ids=token_ids)
        return Start(told, tools, kind, reset.instance, reset.seconds)

    def why_too_long(self, starts: Sequence[Start]) -> str | None:
        """Which prompt of a group is too long with what its environment says; None if none is."""
        longest, limit = max(len(start.prompt.token_ids) for start in starts), self._max_prompt_tokens
        if limit is None or longest <= limit:
            return None
        added = "with what the environment says"
        return f"its prompt has {longest} tokens {added}, and data.max_prompt_tokens is {limit}"

    def parse(self, episode: Episode, token_ids: Sequence[int]) -> ParsedTurn:
        """What a turn says, before it is added to its episode."""
        return self._parser.parse(token_ids, episode.start.tools, prefix=episode.context)

    def is_answered(self, episode: Episode, turn: ParsedTurn) -> bool:
        """Whether somebody answers a turn: tools that it calls, or an environment."""
        return bool(turn.calls) or (episode.start.kind is not None and episode.start.kind.responds)

    def answer(self, episode: Episode, turn: ParsedTurn, then: Callable[[list[Result]], None]) -> None:
        """Call what the turn calls, or have the environment respond to it.

        Calls run at the same time, but those of an environment one after the other: each may change it.

        Args:
            episode: what the turn is of.
            turn: its last one.
            then: called when all have ended, on any thread, with what became of them, in their order.
        """
        instance = episode.start.environment
        calls: list[Call | None] = []
        own: list[int] = []
        if turn.calls:
            for place, call in enumerate(turn.calls):
                is_method = call.name in episode.start.methods
                tool = episode.start.tools.get(call.name)
                function = getattr(instance, call.name) if is_method else tool.function if tool else None
                calls.append(None if call.error or function is None else partial(function, **call.arguments))
                own += [place] * (is_method and call.error is None)
        else:
            calls, own = [partial(instance.respond, turn.message["content"])], [0]
        pending = Pending(self.workers, calls, then)
        pending.start([place for place, call in enumerate(calls) if call and place not in own], own)

    def told(self, episode: Episode, turn: ParsedTurn, results: Sequence[Result]) -> Answer:
        """What the policy is told of the results."""
        failures = [result.error for result in results if result.error is not None]
        failure = failures[0] if failures else None
        if not turn.calls:
            (result,) = results
            hangs = result.hangs
            if result.error is None and result.value is None:
                return Answer([])
            messages: list[Message] = [{"role": "user", "content": self._text(result)}]
            return Answer(messages, ToolUse(timeouts=int(hangs)), failure, hangs)
        messages, unknown, failed, hangs = [], 0, 0, False
        timeouts = sum(result.hangs for result in results)
        for call, result in zip(turn.calls, results, strict=True):
            is_wrong = call.error is not None
            hangs |= result.hangs and call.name in episode.start.methods
            shown = Result(error=call.error) if is_wrong else result
            unknown += is_wrong and call.name not in episode.start.tools
            failed += shown.error is not None
            entry = {} if call.id is None else {"tool_call_id": call.id}
            messages.append({"role": "tool", "name": call.name, "content": self._text(shown)} | entry)
        seconds = sum(result.seconds for result in results)
        use = ToolUse(len(turn.calls), failed, unknown, timeouts, seconds)
        return Answer(messages, use, failure, hangs)

    def _text(self, result: Result) -> str:
        """At most `max_result_tokens` of what the policy is told."""
        text = told_text(result)
        limit = self.config.max_result_tokens
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(token_ids) <= limit:
            return text
        note = CUT.format(count=len(token_ids))
        left = max(limit - len(self._tokenizer(note, add_special_tokens=False)["input_ids"]), 0)
        kept: str = self._tokenizer.decode(token_ids[:left]).rstrip("\N{REPLACEMENT CHARACTER}")
        return kept + note

    def go_on(self, episode: Episode, answer: Answer) -> bool:
        """Add what was answered to an episode; False if it leaves no room for a further token."""
        last = episode.token_ids[-1]
        answered = self._template.answer_ids(answer.messages, ended=last in self._end_ids, last_id=last)
        start = episode.start
        tools = list(start.tools.values())
        if not self._template.keeps(episode.messages[-1], answer.messages, tools):
            whole = [*start.prompt.content, *episode.messages, *answer.messages]
            context, before = self._template.prompt_ids(whole, tools), episode.context
            if context[: len(before)] != before:
                longer = len(context) - len(start.prompt.token_ids)
                if max(episode.spent + len(answered), longer) >= episode.limit:
                    return False
                episode.begin_anew(context, len(answered), answer.messages)
                return True
            answered = context[len(before) :]
        if len(answered) >= episode.room:
            return False
        episode.read(answered, answer.messages)
        return True

    def take_back(self, reset: Reset) -> None:
        """Let other episodes have an environment that was reset for one that does not begin."""
        if reset.kind is not None:
            self.pool.give_back(reset.kind.name, reset.instance)

    def give_back(self, episode: Episode) -> None:
        """Let other episodes have an environment; what scores this one has done so."""
        kind, environment = episode.start.kind, episode.start.environment
        if kind is not None and episode.hangs:
            self.pool.discard(kind.name, environment, hangs=True)
        elif kind is not None:
            self.pool.give_back(kind.name, environment)

    def close(self) -> None:
        """Close the environments."""
        self.pool.close()


def told_text(result: Result) -> str:
    """What the policy is told of a result, whose text may be code of the user's that raises what it likes."""
    try:
        return result_text(result.value if result.error is None else {"error": result.error})
    except Exception as error:
        return result_text({"error": f"the result has no text: {said_by(error)}"})


def said_by(error: BaseException) -> str:
    """What an exception says; its type if it says nothing or cannot."""
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__


class Pending:
    """The calls of a turn on their way.

    Args:
        workers: what they run on.
        calls: None where there is nothing to call.
        then: called once with all results.
    """

    def __init__(
        self, workers: Workers, calls: Sequence[Call | None], then: Callable[[list[Result]], None]
    ) -> None:
        self._workers = workers
        self._calls = calls
        self._then = then
        self._results = [Result() for _ in calls]
        self._left = sum(call is not None for call in calls)
        self._lock = threading.Lock()

    def start(self, at_once: Sequence[int], in_turn: Sequence[int]) -> None:
        """Run these calls, the former at the same time, the latter one after the other."""
        if not self._left:
            self._then(self._results)
            return
        for place in at_once:
            self._run([place])
        if in_turn:
            self._run(in_turn)

    def _run(self, places: Sequence[int]) -> None:
        place, *others = places
        call = self._calls[place]
        assert call is not None
        began: list[float] = []  # not when it is submitted: it may have to wait for a thread

        def timed() -> Any:
            began.append(time.monotonic())
            return call()

        def ended(done: Future[Any]) -> None:
            error = done.exception()
            seconds = time.monotonic() - began[0] if began else 0.0
            if error is None:
                result = Result(done.result(), None, seconds)
            else:
                result = Result(None, said_by(error), seconds, isinstance(error, CallTimeout))
            self._results[place] = result
            if result.hangs:  # nobody else may enter the environment meanwhile
                for later in others:
                    self._results[later] = replace(result, seconds=0.0)
            if others and not result.hangs:
                self._run(others)
            with self._lock:
                self._left -= 1 + (len(others) if result.hangs else 0)
                is_over = not self._left
            if is_over:
                self._then(self._results)

        self._workers.submit(timed).add_done_callback(ended)
