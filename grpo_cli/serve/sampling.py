"""A request for a group in vLLM's words, and vLLM's answer in ours."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from grpo_cli.serve.protocol import GenerateRequest, ServedCompletion


def sampling_params(request: GenerateRequest) -> SamplingParams:
    """What ends a completion is the trainer's business alone: the model's own configuration adds nothing."""
    return SamplingParams(
        n=request.n,
        seed=request.seed,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=True,
        logprobs=0,
        detokenize=bool(request.stop),
        skip_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def served_completions(output: Any) -> list[ServedCompletion]:
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
        completions.append(ServedCompletion(token_ids=tokens, logprobs=logprobs, finish_reason=part.finish_reason))
    return completions
