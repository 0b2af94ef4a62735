"""Takes completions from their prompts to their ends, on any engine that gives turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue

from grpo_cli.data.prompts import Prompt
from grpo_cli.rollout.engine import Completion, OnGroup, SampledTurn, SampleKey, Turn, TurnEngine

Event = tuple[int, SampledTurn | Exception]


class Driver:
    """A `RolloutEngine` on a `TurnEngine`. No completion waits for another.

    Args:
        engine: generates the turns.
        max_completion_tokens: of a whole completion.
    """

    def __init__(self, engine: TurnEngine, max_completion_tokens: int) -> None:
        self.engine = engine
        self._limit = max_completion_tokens

    def update_weights(self, version: int) -> int:
        """See `RolloutEngine.update_weights`."""
        return self.engine.update_weights(version)

    def release_memory(self) -> None:
        """See `RolloutEngine.release_memory`."""
        self.engine.release_memory()

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self.engine.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: a prompt is longer than the engine can take.
        """
        if not prompts:
            return []
        completions: list[Completion | None] = [None] * (len(prompts) * num_generations)
        unfinished = [num_generations] * len(prompts)
        groups: list[list[Completion]] = [[] for _ in prompts]
        events: SimpleQueue[Event] = SimpleQueue()
        with self.engine.stream(lambda number, turn: events.put((number, turn))) as stream:
            stream.ask(
                [
                    Turn(
                        index * num_generations + sample,
                        index,
                        prompt.token_ids,
                        key,
                        sample,
                        0,
                        self._limit,
                        may_go_on=False,
                    )
                    for index, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
                    for sample in range(num_generations)
                ]
            )
            while any(unfinished):
                has_computed = stream.advance()
                for number, turn in _arrived(events, wait=not has_computed):
                    if isinstance(turn, Exception):
                        raise turn
                    completions[number] = Completion(turn.token_ids, turn.logprobs, turn.finish_reason, turn.text)
                    group = number // num_generations
                    unfinished[group] -= 1
                    if not unfinished[group]:
                        own = completions[group * num_generations : (group + 1) * num_generations]
                        groups[group] = [completion for completion in own if completion is not None]
                        if on_group is not None:
                            on_group(group, groups[group])
        return groups


def _arrived(events: SimpleQueue[Event], *, wait: bool) -> Iterator[Event]:
    """What has happened since; where nothing has, wait for one thing if asked to."""
    if wait:
        yield events.get()
    while True:
        try:
            yield events.get_nowait()
        except Empty:
            return
