"""The embedded engine: generates with the policy itself, in the training process.

A prompt is computed once and its cache repeated for its group; a row leaves the batch as soon as it is finished.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grpo_cli.errors import UserError
from grpo_cli.policy.model import evaluating
from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.engine import Completion, SampleKey, sample_uniforms

CACHE_TOKENS = 65_536
"""Tokens of key/value cache that are generated at once; further groups wait for the next wave."""


class TransformersEngine:
    """Samples from a transformers causal language model with its own decoding loop.

    Args:
        model: the policy; its current weights are used at every call.
        tokenizer: decodes completions and names the end-of-sequence token.
        config: the recipe's `generation` section.
        autocast: context manager factory for the forward passes' precision.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: GenerationConfig,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.autocast = autocast
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self.cache_name = cache_name(model)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[SampleKey], num_generations: int
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        groups: list[list[Completion]] = []
        with evaluating(self.model), self.autocast():
            for wave in self._waves(prompts, num_generations):
                parts = [prompts[i] for i in wave], [keys[i] for i in wave]
                groups.extend(self._generate_wave(*parts, num_generations))
        return groups

    def _waves(self, prompts: Sequence[Sequence[int]], num_generations: int) -> Iterator[range]:
        """Consecutive prompts whose caches fit into CACHE_TOKENS together; at least one."""
        start, longest = 0, 0
        for index, prompt in enumerate(prompts):
            longest = max(longest, len(prompt))
            rows = (index + 1 - start) * num_generations
            if index > start and rows * (longest + self.config.max_completion_tokens) > CACHE_TOKENS:
                yield range(start, index)
                start, longest = index, len(prompt)
        yield range(start, len(prompts))

    def _generate_wave(
        self, prompts: Sequence[Sequence[int]], keys: Sequence[SampleKey], num_generations: int
    ) -> list[list[Completion]]:
        wave = _Wave(self, prompts, keys, num_generations)
        logits, cache = wave.prefill()
        while wave.rows.numel():
            wave.append(logits)
            keep = wave.unfinished()
            if keep.numel() < wave.rows.numel():
                wave.keep(keep, cache)
            if wave.rows.numel():
                logits = wave.decode(cache)
        completions = [self._completion(*row) for row in wave.results()]
        starts = range(0, len(completions), num_generations)
        return [completions[start : start + num_generations] for start in starts]

    def _completion(self, token_ids: list[int], logprobs: list[float], stopped: bool) -> Completion:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return Completion(token_ids, logprobs, "stop" if stopped else "length", self._before_stop(text))

    def _before_stop(self, text: str) -> str:
        ends = [text.find(stop) for stop in self.config.stop if stop in text]
        return text[: min(ends)] if ends else text

    def hits_stop_string(self, token_ids: list[int]) -> bool:
        """Whether the text so far, special tokens included, holds a stop string."""
        text = self.tokenizer.decode(token_ids)
        return any(stop in text for stop in self.config.stop)


class _Wave:
    """The rows that are generated together: R = prompts x num_generations at first, fewer as they finish."""

    def __init__(
        self,
        engine: TransformersEngine,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SampleKey],
        num_generations: int,
    ) -> None:
        self.engine = engine
        self.num_generations = num_generations
        device, limit = engine.model.device, engine.config.max_completion_tokens
        num_rows = len(prompts) * num_generations
        width = max(len(prompt) for prompt in prompts)
        # Padding repeats a token of the prompt itself, so that a repetition penalty meets no stranger.
        padded = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        visible = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.prompt_ids = torch.tensor(padded, device=device)  # (P, W)
        self.attention_mask = torch.tensor(visible, device=device)  # (P, W), then (R, W + t)
        self.positions = self.attention_mask.sum(-1)  # (P,), then (R,): position of the next token
        uniforms = [sample_uniforms(key, sample, limit) for key in keys for sample in range(num_generations)]
        self.uniforms = torch.from_numpy(np.stack(uniforms)).to(device)  # (all rows, limit)
        self.processors = logits_processors(engine.config)
        self.history = self.prompt_ids.repeat_interleave(num_generations, 0)  # (R, W + t)
        self.rows = torch.arange(num_rows, device=device)  # (R,) which completion each row is
        self.tokens = torch.zeros(num_rows, limit, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(num_rows, limit, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.stopped = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.eos = torch.tensor(sorted(engine.eos_token_ids), device=device)
        self.length = 0

    def prefill(self) -> tuple[torch.Tensor, Any]:
        """Compute each prompt once; return the (R, V) logits of every row and the cache of its group.

        Raises:
            UserError: the model keeps its state in a way of its own.
        """
        group_size, name = self.num_generations, self.engine.cache_name
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        output = self.engine.model(
            input_ids=self.prompt_ids,
            attention_mask=self.attention_mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{name: DynamicCache(config=self.engine.model.config)},
        )
        cache = getattr(output, name, None)
        if cache is None:
            raise UserError(
                f"generation.engine: transformers cannot generate with {type(self.engine.model).__name__}, which "
                "does not hand out its cache; use another model"
            )
        repeat = torch.arange(len(self.prompt_ids), device=self.prompt_ids.device)
        cache.reorder_cache(repeat.repeat_interleave(group_size))
        self.attention_mask = self.attention_mask.repeat_interleave(group_size, 0)
        self.positions = self.positions.repeat_interleave(group_size)
        return output.logits[:, -1].repeat_interleave(group_size, 0), cache

    def append(self, logits: torch.Tensor) -> None:
        """Sample the next token of every row from its (R, V) logits."""
        tokens, logprobs = sample_tokens(
            logits,
            self.uniforms[self.rows, self.length],
            self.engine.config.temperature,
            self.processors,
            self.history,
        )
        self.tokens[self.rows, self.length] = tokens
        self.logprobs[self.rows, self.length] = logprobs
        self.length += 1
        self.lengths[self.rows] = self.length
        self.history = torch.cat([self.history, tokens[:, None]], 1)

    def unfinished(self) -> torch.Tensor:
        """Places in the batch of the rows that go on."""
        stopped = torch.isin(self.history[:, -1], self.eos)  # (R,)
        if self.engine.config.stop:
            texts = self.tokens[self.rows, : self.length].tolist()
            hits = [self.engine.hits_stop_string(text) for text in texts]
            stopped |= torch.tensor(hits, device=stopped.device)
        self.stopped[self.rows] = stopped
        if self.length == self.engine.config.max_completion_tokens:
            return stopped.new_empty(0, dtype=torch.long)
        return (~stopped).nonzero().squeeze(1)

    def keep(self, places: torch.Tensor, cache: Any) -> None:
        """Let all rows but these leave the batch."""
        self.rows = self.rows[places]
        self.history = self.history[places]
        self.attention_mask = self.attention_mask[places]
        self.positions = self.positions[places]
        if places.numel():
            cache.reorder_cache(places)

    def decode(self, cache: Any) -> torch.Tensor:
        """Run the last token of every row; return the (R, V) logits of the next."""
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(self.rows), 1)], 1)
        output = self.engine.model(
            input_ids=self.history[:, -1:],
            # Padding is no part of a state, and a mask over it would be taken for one over this token.
            attention_mask=self.attention_mask if self.engine.cache_name == "past_key_values" else None,
            position_ids=self.positions[:, None],
            use_cache=True,
            **{self.engine.cache_name: cache},
        )
        self.positions = self.positions + 1
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def results(self) -> Iterator[tuple[list[int], list[float], bool]]:
        """Token ids, log-probabilities and whether it ended by itself, of each completion in order."""
        rows = zip(self.tokens.tolist(), self.logprobs.tolist(), self.lengths.tolist(), strict=True)
        for (tokens, logprobs, length), stopped in zip(rows, self.stopped.tolist(), strict=True):
            yield tokens[:length], logprobs[:length], stopped


def sample_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float,
    processors: LogitsProcessorList,
    history: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token for each row by inverting its cumulative distribution, so one uniform decides one token.

    Args:
        logits: (R, V).
        uniforms: (R,) in [0, 1).
        temperature: divides the logits.
        processors: applied to the divided logits (penalty, top-k, top-p, min-p).
        history: (R, L) tokens so far, for the penalty.

    Returns:
        (R,) tokens and (R,) their log-probabilities under softmax(logits / temperature), before processing.
    """
    scaled = logits.float() / temperature
    probabilities = processors(history, scaled).double().softmax(-1)
    cumulative = probabilities.cumsum(-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).clamp(max=logits.shape[1] - 1)
    logprobs = scaled.log_softmax(-1).gather(1, tokens)
    return tokens.squeeze(1), logprobs.squeeze(1)


def logits_processors(config: GenerationConfig) -> LogitsProcessorList:
    """The processors that the recipe asks for, in transformers' order."""
    processors = LogitsProcessorList()
    if config.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        processors.append(MinPLogitsWarper(config.min_p))
    return processors


def eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends a completion: the generation config's and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def cache_name(model: Any) -> str:
    """The argument in which the model takes its cache and the output in which it gives it back."""
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes_state = "cache_params" in inspect.signature(unwrapped.forward).parameters  # state-space models
    return "cache_params" if takes_state else "past_key_values"
