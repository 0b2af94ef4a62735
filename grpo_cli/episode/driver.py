"""Takes completions from their prompts to their ends, on any engine that gives turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from grpo_cli.data.prompts import Prompt
from grpo_cli.episode.calls import ParsedTurn
from grpo_cli.episode.episode import Episode, Start
from grpo_cli.episode.world import Reset, Result, World
from grpo_cli.errors import RunError, UserError
from grpo_cli.plugins import origin
from grpo_cli.rollout.engine import (
    Completion,
    Demand,
    FinishReason,
    OnGroup,
    SampledTurn,
    SampleKey,
    Turn,
    TurnEngine,
    TurnStream,
)

Event = Callable[[], None]
"""What is to be done, on the driver's thread, about something that has happened on another."""


class Driver:
    """A `RolloutEngine` on a `TurnEngine`. No completion waits for another.

    Args:
        engine: generates the turns.
        max_completion_tokens: of a whole completion.
        world: what completions are played in; without one, each is a single turn.
        note: told of groups that are left out.
    """

    def __init__(
        self,
        engine: TurnEngine,
        max_completion_tokens: int,
        world: World | None = None,
        note: Callable[[str], None] = print,
    ) -> None:
        self.engine = engine
        self.world = world
        self.note = note
        self.limit = max_completion_tokens
        self._played: list[Episode] = []
        """The last rollout's, whose environments are looked at until the next begins."""

    def update_weights(self, version: int) -> int:
        """See `RolloutEngine.update_weights`."""
        return self.engine.update_weights(version)

    def release_memory(self) -> None:
        """See `RolloutEngine.release_memory`."""
        self.engine.release_memory()

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._give_back()
        if self.world is not None:
            self.world.close()
        self.engine.close()

    def _give_back(self) -> None:
        for episode in self._played:
            assert self.world is not None
            self.world.give_back(episode)
        self._played = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Environments of one call are there until the next.

        Raises:
            UserError: a prompt is longer than the engine can take, or a row asks for an environment that there is
                not.
            RunError: a tool failed, and `episode.on_error` is raise.
        """
        self._give_back()
        events: SimpleQueue[Event] = SimpleQueue()

        def on_turn(number: int, turn: SampledTurn | Exception) -> None:
            events.put(lambda: play.sampled(number, turn))

        count = len(prompts) * num_generations
        begins_alike = self.world is None or not self.world.has_environments
        demand = Demand(count, len(prompts) if begins_alike else count, num_generations)
        with self.engine.stream(on_turn, demand) as stream:
            play = Play(self, stream, prompts, keys, num_generations, on_group, events)
            try:
                play.to_the_end()
            finally:
                play.take_back_resets()
                self._played = play.with_environments()
        return play.groups


class Play:
    """The completions of one call."""

    def __init__(
        self,
        driver: Driver,
        stream: TurnStream,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        on_group: OnGroup | None,
        events: SimpleQueue[Event],
    ) -> None:
        self.groups: list[list[Completion]] = [[] for _ in prompts]
        self._driver = driver
        self._world = driver.world
        self._stream = stream
        self._prompts = prompts
        self._keys = keys
        self._size = num_generations
        self._on_group = on_group
        self._events = events
        self._asked: list[Turn] = []
        self._episodes: dict[int, Episode] = {}
        self._resets: dict[int, list[Future[Reset]]] = {}
        self._ended: dict[int, Completion] = {}
        self._unfinished = len(prompts)

    def to_the_end(self) -> None:
        """Play all completions."""
        for index in range(len(self._prompts)):
            self._open(index)
        while self._unfinished:
            if self._asked:
                asked, self._asked = self._asked, []
                self._stream.ask(asked)
            self._take_events(wait=not self._stream.advance())

    def _take_events(self, *, wait: bool) -> None:
        """Do what is to be done since; where there is nothing, wait for one thing if asked to."""
        if wait and not self._asked:
            self._events.get()()
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                return
            event()

    def _open(self, index: int) -> None:
        """Begin a group once its environments are reset, if it has any."""
        prompt, key = self._prompts[index], self._keys[index]
        if self._world is None:
            self._begin(index, [Start(prompt)] * self._size)
            return
        resets = self._resets[index] = [self._world.reset(prompt, key) for _ in range(self._size)]
        left = iter(range(self._size - 1, -1, -1))

        def ended(_: Future[Reset]) -> None:
            if next(left) == 0:  # `next` is one step of the interpreter: each thread gets another number
                self._events.put(functools.partial(self._were_reset, index))

        for reset in resets:
            reset.add_done_callback(ended)

    def _were_reset(self, index: int) -> None:
        assert self._world is not None
        prompt, world, resets = self._prompts[index], self._world, self._resets[index]
        errors = [error for reset in resets if (error := reset.exception()) is not None]
        for error in errors:
            if isinstance(error, UserError):
                raise error
        done = [reset.result() for reset in resets if reset.exception() is None]
        why = f"its environment could not be reset: {origin(errors[0])}" if errors else None
        if not errors:
            starts = [world.start(prompt, reset) for reset in done]
            why = world.why_too_long(starts)
            if why is None:
                del self._resets[index]
                self._begin(index, starts)
                return
        for future in self._resets.pop(index):
            self._take_back(future)
        self._driver.note(f"a group is left out: {why}")
        for sample in range(self._size):
            self._ended[index * self._size + sample] = Completion([], [], "lost", "", messages=[])
        self._close(index)

    def _begin(self, index: int, starts: Sequence[Start]) -> None:
        beginnings: dict[tuple[int, ...], int] = {}
        for sample, start in enumerate(starts):
            number = index * self._size + sample
            episode = Episode(number, self._keys[index], sample, start, self._driver.limit)
            self._episodes[number] = episode
            # Environments may say something else to each member; those that are told the same begin alike.
            is_given = start.prompt is self._prompts[index]
            like = index * self._size if is_given else beginnings.setdefault(tuple(episode.prompt_ids), number)
            self._ask(episode, like)

    def _ask(self, episode: Episode, like: int) -> None:
        may_go_on = self._world is not None and len(episode.texts) + 1 < self._world.config.max_turns
        self._asked.append(episode.turn(like, may_go_on=may_go_on))

    def sampled(self, number: int, turn: SampledTurn | Exception) -> None:
        """Add a turn to its completion, and have it answered."""
        if isinstance(turn, Exception):
            raise turn
        episode, world = self._episodes[number], self._world
        if world is None:
            episode.take(turn)
            self._end(episode, turn.finish_reason)
            return
        parsed = world.parse(episode, turn.token_ids)
        episode.take(turn, parsed.message)
        if turn.finish_reason == "length":
            self._end(episode, "length")
        elif not world.is_answered(episode, parsed):
            self._end(episode, "stop")
        elif len(episode.texts) == world.config.max_turns:
            self._end(episode, "max_turns")
        else:
            world.answer(
                episode,
                parsed,
                lambda results: self._events.put(lambda: self._answered(episode, parsed, results)),
            )

    def _answered(self, episode: Episode, parsed: ParsedTurn, results: list[Result]) -> None:
        assert self._world is not None
        on_error = self._world.config.on_error
        answer = self._world.told(episode, parsed, results)
        episode.hangs |= answer.hangs
        episode.tools += answer.use
        if answer.failure is not None and on_error == "raise":
            names = ", ".join(call.name for call in parsed.calls) or "respond"
            raise RunError(f"episode: a call of {names} failed: {answer.failure}")
        if answer.failure is not None and on_error == "end":
            self._end(episode, "tool_failed")
        elif not answer.messages:
            self._end(episode, "stop")
        elif not self._world.go_on(episode, answer):
            self._end(episode, "length")
        else:
            self._ask(episode, episode.number)

    def _end(self, episode: Episode, reason: FinishReason) -> None:
        index = episode.number // self._size
        self._stream.forget(episode.number)
        self._ended[episode.number] = episode.completion(reason, self._prompts[index])
        self._close(index)

    def _close(self, index: int) -> None:
        """Hand out a group once all its completions have ended."""
        numbers = range(index * self._size, (index + 1) * self._size)
        if all(number in self._ended for number in numbers):
            self._unfinished -= 1
            self.groups[index] = [self._ended[number] for number in numbers]
            if self._on_group is not None:
                self._on_group(index, self.groups[index])

    def take_back_resets(self) -> None:
        """Give back, now or once they are reset, the environments of groups that have not begun."""
        for reset in (reset for resets in self._resets.values() for reset in resets):
            reset.add_done_callback(self._take_back)

    def _take_back(self, reset: Future[Reset]) -> None:
        assert self._world is not None
        if reset.exception() is None:
            self._world.take_back(reset.result())

    def with_environments(self) -> list[Episode]:
        """The episodes whose environments are to be given back; one that still plays is left alone."""
        episodes = [episode for episode in self._episodes.values() if episode.start.kind is not None]
        for episode in episodes:
            episode.hangs |= episode.number not in self._ended
        return episodes
