"""The embedded engine: generates with the policy itself, in the training process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey, check_lengths, decoded


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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: a sequence may become longer than the model's rotary embeddings are the same for.
        """
        self._check_lengths(prompts)
        groups: list[list[Completion]] = [[] for _ in prompts]
        batch = Batch(prompts, keys, num_generations, self.sampling, self._ends, self.policy.device)
        unfinished = [num_generations] * len(prompts)
        # Prompts of like length are in memory together, so that little of it is empty; the longest come first, so
        # that a memory that is too small shows at once.
        waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        with self._computing():
            memory = self._memory(prompts, num_generations)
            while waiting or batch.rows:
                count = memory.room([prompts[index] for index in waiting])
                if count:
                    begun, waiting = waiting[:count], waiting[count:]
                    batch.begin(memory.prefill([prompts[index] for index in begun]), begun)
                else:
                    batch.append(memory.decode(batch.last))
                    if not batch.must_look():
                        continue
                finished, places = batch.retire()
                if finished:
                    memory.keep(places)
                for row in finished:
                    group = row // num_generations
                    unfinished[group] -= 1
                    if not unfinished[group]:
                        groups[group] = self._completions(batch, group)
                        if on_group is not None:
                            on_group(group, groups[group])
        return groups

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """What forward passes of a rollout are made in."""
        model = self.policy.model
        with evaluating(model), weights_cast_once(model, self.autocast):
            try:
                yield
            finally:
                if self.graphs is not None:
                    self.graphs.release()

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        limit = steady_positions(self.policy.model)
        if limit is not None:
            what_to_do = (
                f"{limit}, beyond which this model's rotary embeddings depend on what is computed beside a "
                "completion; lower data.max_prompt_tokens or generation.max_completion_tokens"
            )
            check_lengths(prompts, self.sampling.max_completion_tokens, limit, what_to_do)

    def _memory(self, prompts: Sequence[Sequence[int]], num_generations: int) -> Memory:
        limit = self.sampling.max_completion_tokens
        if self.policy.shares_prompts:
            return SharedPromptMemory(self.policy.model, prompts, num_generations, limit, self.graphs)
        return RowMemory(self.policy.model, num_generations, limit)

    def _ends(self, token_ids: list[int]) -> bool:
        """Whether the last token is one that ends completions, or completes a stop string."""
        return token_ids[-1] in self.eos_token_ids or self.stop_strings.completed_by_last(token_ids)

    def _completions(self, batch: Batch, group: int) -> list[Completion]:
        """A finished group, each text up to a stop string."""
        size = batch.group_size
        completions = []
        for row in range(group * size, (group + 1) * size):
            reason = batch.reasons[row]
            assert reason is not None
            text = decoded(self.tokenizer, batch.tokens[row], self.sampling.stop)
            completions.append(Completion(batch.tokens[row], batch.logprobs[row], reason, text))
        return completions


def eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a completion: the generation config's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}
