"""What the engine with vLLM in this process and the engine over servers have in common."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np

from grpo_cli.policy.model import base_model
from grpo_cli.recipe.sampling import Sampling
from grpo_cli.rollout.engine import SampledTurn, SampleKey, Turn, decoded
from grpo_cli.serve.protocol import SampledTokens


def seed_of(turn: Turn) -> int:
    """The seed of a turn. Those of a group's first turns are in a row, as vLLM gives them to a request for n."""
    if turn.number:
        return _seed((*turn.key, turn.sample, turn.number))
    return _seed(turn.key) + turn.sample


def _seed(key: SampleKey) -> int:
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> 2)


def sampled_turn(part: SampledTokens, sampling: Sampling, tokenizer: Any) -> SampledTurn:
    """One turn, decoded.

    vLLM reports log-probabilities of the filtered distribution. Where there is a filter, they cannot be compared
    with the policy's, and are given as not known.
    """
    logprobs = [math.nan] * len(part.token_ids) if sampling.is_filtered else part.logprobs
    text = decoded(tokenizer, part.token_ids, sampling.stop)
    return SampledTurn(part.token_ids, logprobs, part.finish_reason, text)


def save_for_vllm(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what vLLM builds its model from, without weights.

    Args:
        model: the policy or its adapter's wrapper.
        tokenizer: saved beside it.
        folder: made if it is not there.
    """
    base = base_model(model)
    config = copy.deepcopy(base.config)
    # A model that was not loaded from files may not say what it is; vLLM would build one without an output head.
    config.architectures = config.architectures or [type(base).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
