"""Whether what was generated is of the weights that it is said to be of: transformers computes it again."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_cli.serve.protocol import SampledTokens
from tests.load.requests import Sampled

TOLERANCE = 1e-3
"""Of log-probabilities; rounding gives 1e-5."""

BATCH = 256


@dataclass(frozen=True)
class Completion:
    """One that a client was given."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    temperature: float
    versions: range
    """Those that may have generated it."""


@dataclass(frozen=True)
class Verdict:
    wrong: list[str]
    completions: int
    largest: float
    """Largest difference of a log-probability from the right version's."""
    told_apart: int
    """Completions to which a neighbouring version gives other log-probabilities."""


def versioned(model: Any, version: int) -> Any:
    """The model with weights of its own for each version; 0 is the model itself."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in changed.parameters():
            if version:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return changed


def completions_of(sampled: Sampled, body: bytes, versions: range) -> list[Completion]:
    """What an answer holds.

    Raises:
        ValueError, KeyError: it is not what was asked for.
    """
    parts = _streamed(body) if sampled.streams else _whole(json.loads(body))
    lengths = [len(tokens) for tokens, _ in parts]
    if lengths != [sampled.max_tokens] * sampled.n:
        raise ValueError(f"asked for {sampled.n} of {sampled.max_tokens} tokens, got {lengths}")
    return [
        Completion(sampled.prompt, tuple(tokens), tuple(logprobs), sampled.temperature, versions)
        for tokens, logprobs in parts
    ]


Part = tuple[list[int], list[float]]


def _whole(answer: dict[str, Any]) -> list[Part]:
    if "choices" in answer:
        return [_choice(choice) for choice in answer["choices"]]
    samples = [SampledTokens(**part) for part in answer["completions"]]
    return [(part.token_ids, part.logprobs) for part in samples]


def _choice(choice: dict[str, Any]) -> Part:
    """Of vLLM, whose tokens read `token_id:65`."""
    logprobs = choice["logprobs"]
    return [int(token.split(":")[1]) for token in logprobs["tokens"]], logprobs["token_logprobs"]


def _streamed(body: bytes) -> list[Part]:
    """Put together from server-sent events."""
    *events, last, rest = body.decode().split("\n\n")
    if (last, rest) != ("data: [DONE]", ""):
        raise ValueError(f"the stream ends with {last!r} {rest!r}")
    parts: dict[int, Part] = defaultdict(lambda: ([], []))
    for event in events:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            if choice["logprobs"] is not None:
                for all_of_it, new in zip(parts[choice["index"]], _choice(choice), strict=True):
                    all_of_it.extend(new)  # type: ignore[arg-type]
    return [parts[index] for index in sorted(parts)]


def judge(completions: Sequence[Completion], model: Any) -> Verdict:
    """Compare every completion with each version that it may be of, and with a neighbouring one.

    Args:
        completions: what clients were given.
        model: version 0.
    """
    nearest = [float("inf")] * len(completions)
    neighbours = [float("inf")] * len(completions)
    by_version = defaultdict(list)
    for index, one in enumerate(completions):
        for version in one.versions:
            by_version[version].append((index, nearest))
        neighbour = one.versions[0] - 1 if one.versions[0] else one.versions[-1] + 1
        by_version[neighbour].append((index, neighbours))
    for version, places in by_version.items():
        found = _drifts([completions[index] for index, _ in places], versioned(model, version))
        for (index, distances), drift in zip(places, found, strict=True):
            distances[index] = min(distances[index], drift)
    wrong = [
        f"a completion of version {one.versions} is {drift:.4f} away from it"
        for one, drift in zip(completions, nearest, strict=True)
        if not drift < TOLERANCE
    ]
    told_apart = sum(drift > TOLERANCE for drift in neighbours)
    return Verdict(wrong, len(completions), max(nearest, default=0.0), told_apart)


@torch.no_grad()
def _drifts(completions: Sequence[Completion], model: Any) -> Iterable[float]:
    """Largest difference of each completion's log-probabilities from the model's, in their order."""
    drifts = [0.0] * len(completions)
    by_length = sorted(range(len(completions)), key=lambda index: len(completions[index].token_ids))
    for start in range(0, len(by_length), BATCH):
        batch = by_length[start : start + BATCH]
        rows = [[*completions[index].prompt, *completions[index].token_ids] for index in batch]
        longest = max(map(len, rows))
        # What stands after a row's end does not change what comes before it.
        logits = model(torch.tensor([row + [0] * (longest - len(row)) for row in rows])).logits
        for row, index in enumerate(batch):
            one = completions[index]
            first, count = len(one.prompt), len(one.token_ids)
            places = logits[row, first - 1 : first + count - 1] / one.temperature
            expected = places.log_softmax(-1).gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
            drifts[index] = (expected - torch.tensor(one.logprobs)).abs().max().item()
    return drifts
