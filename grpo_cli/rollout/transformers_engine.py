"""The embedded engine: generates with the policy itself, in the training process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from grpo_cli.errors import UserError
from grpo_cli.policy.logprobs import PackedModel, steady_positions
from grpo_cli.policy.model import evaluating
from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.casts import weights_cast_once
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey, decoded, sample_uniforms
from grpo_cli.rollout.memory import Memory, RowMemory
from grpo_cli.rollout.sampling import logits_processors, sample_tokens
from grpo_cli.rollout.shared_prompt_memory import SharedPromptMemory, filled_holes


class TransformersEngine:
    """Samples from a transformers causal language model with its own decoding loop.

    A prompt is computed once and its keys and values are read by its whole group; a row leaves as soon as it is
    finished, and waiting groups take the room.

    Args:
        policy: its current weights are used at every call.
        tokenizer: decodes completions and names the end-of-sequence token.
        config: the recipe's `generation` section.
        autocast: context manager factory for the forward passes' precision.
    """

    def __init__(
        self,
        policy: PackedModel,
        tokenizer: Any,
        config: GenerationConfig,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.config = config
        self.autocast = autocast
        self.eos_token_ids = eos_token_ids(policy.model, tokenizer)

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
        with evaluating(self.policy.model), weights_cast_once(self.policy.model, self.autocast):
            batch = _Batch(self, prompts, keys, num_generations)
            memory = self._memory(prompts, num_generations)
            # Prompts of like length are in memory together, so that little of it is empty; the longest come
            # first, so that a memory that is too small shows at once.
            waiting = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
            while waiting or len(batch.rows):
                count = memory.room([prompts[index] for index in waiting])
                if count:
                    begun, waiting = waiting[:count], waiting[count:]
                    batch.append(memory.prefill([prompts[index] for index in begun]), batch.begin(begun))
                else:
                    batch.append(memory.decode(batch.last_tokens()), batch.rows)
                batch.retire(memory, on_group)
        return batch.groups

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        limit, longest = steady_positions(self.policy.model), max(map(len, prompts), default=0)
        if limit is not None and longest + self.config.max_completion_tokens > limit:
            raise UserError(
                f"a prompt of {longest} tokens and generation.max_completion_tokens "
                f"({self.config.max_completion_tokens}) exceed {limit}, beyond which this model's rotary "
                "embeddings depend on what is computed beside a completion; lower data.max_prompt_tokens or "
                "generation.max_completion_tokens"
            )

    def _memory(self, prompts: Sequence[Sequence[int]], num_generations: int) -> Memory:
        limit = self.config.max_completion_tokens
        if self.policy.shares_prompts:
            return SharedPromptMemory(self.policy.model, prompts, num_generations, limit)
        return RowMemory(self.policy.model, num_generations, limit)

    def completion(self, token_ids: list[int], logprobs: list[float], stopped: bool) -> Completion:
        """A finished row's tokens, and their text up to a stop string."""
        text = decoded(self.tokenizer, token_ids, self.config.stop)
        return Completion(token_ids, logprobs, "stop" if stopped else "length", text)

    def hits_stop_string(self, token_ids: list[int]) -> bool:
        """Whether the text so far, special tokens included, holds a stop string."""
        text = self.tokenizer.decode(token_ids)
        return any(stop in text for stop in self.config.stop)


class _Batch:
    """The N completions of a call, and which R of them are being generated."""

    def __init__(
        self,
        engine: TransformersEngine,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        num_generations: int,
    ) -> None:
        self.engine = engine
        self.group_size = num_generations
        self.groups: list[list[Completion]] = [[] for _ in prompts]
        self.unfinished = [num_generations] * len(prompts)
        device, limit = engine.policy.device, engine.config.max_completion_tokens
        count = len(prompts) * num_generations
        uniforms = [sample_uniforms(key, sample, limit) for key in keys for sample in range(num_generations)]
        self.uniforms = torch.from_numpy(np.array(uniforms).reshape(count, limit)).to(device)  # (N, T)
        self.processors = logits_processors(engine.config)
        self.eos = torch.tensor(sorted(engine.eos_token_ids), device=device)
        width = max((len(prompt) for prompt in prompts), default=0)
        # For a repetition penalty. Padding repeats a token of the prompt, so that no stranger is penalised.
        padded = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        history = torch.tensor(padded, dtype=torch.long, device=device).view(len(prompts), width)
        self.history = history.repeat_interleave(num_generations, 0)  # (N, W)
        self.tokens = torch.zeros(count, limit, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(count, limit, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.stopped = torch.zeros(count, dtype=torch.bool, device=device)
        self.rows = torch.zeros(0, dtype=torch.long, device=device)  # (R,) < N

    def begin(self, groups: Sequence[int]) -> torch.Tensor:
        """Add the rows of these groups at the end; return them."""
        size = self.group_size
        added = [row for group in groups for row in range(group * size, (group + 1) * size)]
        rows = torch.tensor(added, device=self.rows.device)
        self.rows = torch.cat([self.rows, rows])
        return rows

    def last_tokens(self) -> torch.Tensor:
        """(R,)"""
        return self.tokens[self.rows, self.lengths[self.rows] - 1]

    def append(self, logits: torch.Tensor, rows: torch.Tensor) -> None:
        """Sample the next token of these rows from their logits."""
        places = self.lengths[rows]
        history = self._history(rows) if self.processors else self.history[:0]
        tokens, logprobs = sample_tokens(
            logits, self.uniforms[rows, places], self.engine.config.temperature, self.processors, history
        )
        self.tokens[rows, places] = tokens
        self.logprobs[rows, places] = logprobs
        self.lengths[rows] = places + 1
        stopped = torch.isin(tokens, self.eos)
        if self.engine.config.stop:
            texts = (self.tokens[row, : self.lengths[row]].tolist() for row in rows)
            hits = [self.engine.hits_stop_string(text) for text in texts]
            stopped |= torch.tensor(hits, device=stopped.device)
        self.stopped[rows] = stopped

    def _history(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, W + t) tokens so far; what a shorter row lacks repeats its prompt."""
        own = self.tokens[rows, : int(self.lengths[rows].max())]  # (R, t)
        is_own = torch.arange(own.shape[1], device=own.device) < self.lengths[rows, None]
        return torch.cat([self.history[rows], torch.where(is_own, own, self.history[rows, :1])], 1)

    def retire(self, memory: Memory, on_group: OnGroup | None) -> None:
        """Let finished rows go, and hand out the groups that are finished with them."""
        is_alive = ~self.stopped[self.rows] & (self.lengths[self.rows] < self.tokens.shape[1])  # (R,)
        if is_alive.all():
            return
        finished = self.rows[~is_alive].tolist()
        places = filled_holes(is_alive)
        memory.keep(places)
        self.rows = self.rows[places]
        for row in finished:
            group = row // self.group_size
            self.unfinished[group] -= 1
            if not self.unfinished[group]:
                self.groups[group] = self._completions(group)
                if on_group is not None:
                    on_group(group, self.groups[group])

    def _completions(self, group: int) -> list[Completion]:
        rows = slice(group * self.group_size, (group + 1) * self.group_size)
        parts = (part[rows].tolist() for part in (self.tokens, self.logprobs, self.lengths, self.stopped))
        return [
            self.engine.completion(tokens[:length], logprobs[:length], stopped)
            for tokens, logprobs, length, stopped in zip(*parts, strict=True)
        ]


def eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a completion: the generation config's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}
