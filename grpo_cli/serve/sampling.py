"""Sampling settings in vLLM's words and its answer in ours, for the server and for the engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from grpo_cli.recipe.sampling import Sampling
from grpo_cli.serve.protocol import SampledTokens


def sampling_params(
    sampling: Sampling, *, n: int, seed: int | None, stop_token_ids: Sequence[int]
) -> SamplingParams:
    """For a group of `n` completions, of which the i-th is drawn with seed + i.

    Only `stop_token_ids` and the settings end a completion; the model's own configuration adds nothing.
    """
    return SamplingParams(
        n=n,
        seed=seed,
        max_tokens=sampling.max_completion_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop=list(sampling.stop),
        stop_token_ids=list(stop_token_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=bool(sampling.stop),
        skip_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled_tokens(output: Any) -> list[SampledTokens]:
    """The group in a finished vllm.RequestOutput.

    Raises:
        InterruptedError: a completion was ended from outside.
    """
    completions = []
    for part in output.outputs:
        if part.finish_reason not in ("stop", "length"):
            raise InterruptedError(f"generation ended with {part.finish_reason}")
        tokens = list(part.token_ids)
        logprobs = [place[token].logprob for place, token in zip(part.logprobs, tokens, strict=True)]
        completions.append(SampledTokens(token_ids=tokens, logprobs=logprobs, finish_reason=part.finish_reason))
    return completions
