"""The embedded engine: generates with the policy itself, in the training process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import Any

from grpo_cli.policy.logprobs import PackedModel, steady_positions
from grpo_cli.policy.model import evaluating
from grpo_cli.recipe.sampling import Sampling
from grpo_cli.rollout.embedded.batch import Batch
from grpo_cli.rollout.embedded.casts import weights_cast_once
from grpo_cli.rollout.embedded.decode_graphs import DecodeGraphs
from grpo_cli.rollout.embedded.memory import Memory, RowMemory
from grpo_cli.rollout.embedded.shared_prompt_memory import SharedPromptMemory
from grpo_cli.rollout.embedded.stop_strings import StopStrings
from grpo_cli.rollout.engine import Demand, OnTurn, SampledTurn, Turn, check_lengths, decoded


class EmbeddedEngine:
    """Samples from a transformers causal language model with its own decoding loop.

    A prompt is computed once and its keys and values are read by its whole group; a row leaves as soon as it is
    finished, and waiting groups take the room.

    Args:
        policy: its current weights are used at every call.
        tokenizer: decodes completions and names the end-of-sequence token.
        sampling: how tokens are drawn and where a completion ends.
        autocast: context manager factory for the forward passes' precision.
        note: told what generates more slowly than it might.
    """

    def __init__(
        self,
        policy: PackedModel,
        tokenizer: Any,
        sampling: Sampling,
        autocast: Callable[[], AbstractContextManager[Any]],
        note: Callable[[str], None] = print,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.autocast = autocast
        self.eos_token_ids = eos_token_ids(policy.model, tokenizer)
        self.stop_strings = StopStrings(tokenizer, sampling.stop)
        self.graphs = DecodeGraphs(note) if policy.device.type == "cuda" else None

    def update_weights(self, version: int) -> int:
        """Nothing to do: the policy's own weights generate."""
        return 0

    def release_memory(self) -> None:
        """Nothing: what a call takes, it gives back when it ends."""

    def close(self) -> None:
        """Nothing to let go of."""

    @contextmanager
    def stream(self, on_turn: OnTurn, demand: Demand) -> Iterator[EmbeddedStream]:
        """See `TurnEngine.stream`."""
        model = self.policy.model
        with evaluating(model), weights_cast_once(model, self.autocast):
            try:
                yield EmbeddedStream(self, on_turn, demand)
            finally:
                if self.graphs is not None:
                    self.graphs.release()

    def check_lengths(self, turns: Sequence[Turn]) -> None:
        """Raise UserError if a turn may become longer than the model's rotary embeddings are the same for."""
        limit = steady_positions(self.policy.model)
        if limit is not None:
            what_to_do = (
                f"{limit}, beyond which this model's rotary embeddings depend on what is computed beside a "
                "completion; lower data.max_prompt_tokens or generation.max_completion_tokens"
            )
            check_lengths(turns, limit, what_to_do)

    def memory(self, prompt_width: int, demand: Demand) -> Memory:
        """For what will be asked for, of prompts of about so many tokens."""
        limit = self.sampling.max_completion_tokens
        if self.policy.shares_prompts:
            return SharedPromptMemory(self.policy.model, prompt_width, demand, limit, self.graphs)
        return RowMemory(self.policy.model, demand.group_size, limit)

    def ends(self, token_ids: list[int]) -> bool:
        """Whether the last token is one that ends completions, or completes a stop string."""
        return token_ids[-1] in self.eos_token_ids or self.stop_strings.completed_by_last(token_ids)


class EmbeddedStream:
    """A `TurnStream`: one forward pass at a time, of new groups, of rows that read on, or of all rows.

    Args:
        engine: whose policy generates.
        on_turn: told of each finished turn, on the thread that advances.
        demand: what will be asked for.
    """

    def __init__(self, engine: EmbeddedEngine, on_turn: OnTurn, demand: Demand) -> None:
        self._engine = engine
        self._on_turn = on_turn
        self._demand = demand
        self._batch = Batch(engine.sampling, engine.ends, engine.policy.device)
        self._memory: Memory | None = None
        self._groups: list[list[Turn]] = []
        """Not begun yet."""
        self._further: list[Turn] = []
        """Of rows that wait in memory."""
        self._read: dict[int, list[int]] = {}
        """What the waiting rows have read, by completion."""

    def ask(self, turns: Sequence[Turn]) -> None:
        """See `TurnStream.ask`.

        Raises:
            UserError: a turn may become longer than the model's rotary embeddings are the same for.
        """
        self._engine.check_lengths(turns)
        first = [turn for turn in turns if not turn.number]
        self._groups += [list(group) for _, group in groupby(first, key=lambda turn: turn.group)]
        # Prompts of like length are in memory together, so that little of it is empty; the longest come first, so
        # that a memory that is too small shows at once.
        self._groups.sort(key=lambda group: -len(group[0].token_ids))
        self._further += [turn for turn in turns if turn.number]

    def advance(self) -> bool:
        """See `TurnStream.advance`."""
        if self._memory is None:
            if not self._groups:
                return False
            longest = len(self._groups[0][0].token_ids)
            self._memory = self._engine.memory(longest, self._demand)
        memory, batch = self._memory, self._batch
        if self._further and self._read_on(memory, batch):
            pass
        elif count := memory.room([(len(group[0].token_ids), len(group)) for group in self._groups]):
            begun, self._groups = self._groups[:count], self._groups[count:]
            logits = memory.prefill([group[0].token_ids for group in begun], list(map(len, begun)))
            batch.begin(logits, [turn for group in begun for turn in group])
        elif batch.rows:
            batch.append(memory.decode(batch.last))
            if not batch.must_look():
                return True
        else:
            return False
        self._retire(memory, batch)
        return True

    def _read_on(self, memory: Memory, batch: Batch) -> bool:
        """Compute what has been answered, for all rows at once; return whether there was any.

        A turn that does not go on from what its row has read is begun anew, alone.
        """
        turns, self._further = self._further, []
        held = [self._held(memory, turn) for turn in turns]
        kept = [(turn, count) for turn, count in zip(turns, held, strict=True) if count is not None]
        for turn, count in zip(turns, held, strict=True):
            if count is None:
                self.forget(turn.completion)
                self._groups.append([turn])
        if kept:
            new = [turn.token_ids[count:] for turn, count in kept]
            logits = memory.extend([turn.completion for turn, _ in kept], [count for _, count in kept], new)
            batch.begin(logits, [turn for turn, _ in kept])
        return bool(kept)

    def _held(self, memory: Memory, turn: Turn) -> int | None:
        """How many of the turn's tokens its row holds; None if it cannot go on from there."""
        prompt_length = memory.prompt_length(turn.completion)
        if prompt_length is None:
            return None
        common = common_length(self._read.pop(turn.completion), turn.token_ids)
        return common if common >= prompt_length else None

    def _retire(self, memory: Memory, batch: Batch) -> None:
        """Give out the turns that have finished; rows of completions that may go on wait in memory."""
        places, staying = batch.retire()
        if not places:
            return
        finished = [(place, batch.rows[place]) for place in places]
        parked = {row.turn.completion: place for place, row in finished if row.turn.may_go_on}
        memory.keep(staying, parked)
        batch.keep(staying)
        for _, row in finished:
            if row.turn.may_go_on:
                self._read[row.turn.completion] = [*row.turn.token_ids, *row.tokens[:-1]]
            assert row.reason is not None
            text = decoded(self._engine.tokenizer, row.tokens, self._engine.sampling.stop)
            self._on_turn(row.turn.completion, SampledTurn(row.tokens, row.logprobs, row.reason, text))

    def forget(self, completion: int) -> None:
        """See `TurnStream.forget`."""
        self._read.pop(completion, None)
        if self._memory is not None:
            self._memory.drop(completion)


def common_length(read: Sequence[int], token_ids: Sequence[int]) -> int:
    """How many tokens of `token_ids`, but for its last, `read` begins with."""
    limit = min(len(read), len(token_ids) - 1)
    if list(read[:limit]) == list(token_ids[:limit]):
        return limit
    return next(place for place in range(limit) if read[place] != token_ids[place])


def eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a completion: the generation config's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}
