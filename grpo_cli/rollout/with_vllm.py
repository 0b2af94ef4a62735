"""What the recipe asks of vLLM for a prompt, and what comes back, whether over HTTP or in this process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_cli.recipe.schema import GenerationConfig
from grpo_cli.rollout.engine import Completion, SampleKey, decoded
from grpo_cli.serve.protocol import GenerateRequest, ServedCompletion, Weights


def generate_request(
    config: GenerationConfig,
    eos_token_ids: set[int],
    prompt: Sequence[int],
    key: SampleKey,
    num_generations: int,
    weights: Weights | None = None,
) -> GenerateRequest:
    """One prompt's group; its seed follows from the key, and from the seed each completion's."""
    seed = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> 2)
    return GenerateRequest(
        token_ids=list(prompt),
        n=num_generations,
        max_tokens=config.max_completion_tokens,
        seed=seed,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=list(config.stop),
        stop_token_ids=sorted(eos_token_ids),
        weights=weights,
    )


def completion(part: ServedCompletion, config: GenerationConfig, tokenizer: Any) -> Completion:
    """One completion, decoded. vLLM reports log-probabilities of the filtered distribution; where there is a
    filter, they do not compare with the policy's and are given as not known."""
    logprobs = [math.nan] * len(part.token_ids) if config.is_filtered else part.logprobs
    text = decoded(tokenizer, part.token_ids, config.stop)
    return Completion(part.token_ids, logprobs, part.finish_reason, text)
