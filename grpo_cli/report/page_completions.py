"""The completions of a page: a sample of what runs have stored, within the limits of `sampling.py`."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from grpo_cli.errors import RunError
from grpo_cli.record.completions import StoredCompletion
from grpo_cli.report.run import Run
from grpo_cli.report.sampling import (
    MAX_BYTES,
    MAX_CHARACTERS,
    MAX_COMPLETIONS,
    MAX_IN_WHOLE_STEPS,
    MAX_STEPS,
    ChosenGroup,
    CutText,
    chosen_groups,
    chosen_samples,
    cut,
    cut_tokens,
    evenly_spaced,
)
from grpo_cli.report.tokens import token_ratios

MAX_EXTRA = 300
"""Characters of a value of `log_extra`."""

LEAST_OF_A_MESSAGE = 100
"""Characters that a message keeps, however many there are."""


class Completions:
    """Samples the completions of runs, and remembers what was left out."""

    def __init__(self, runs: Sequence[Run], labels: Sequence[str]) -> None:
        self._runs = runs
        self._labels = labels
        self._unreadable: list[str] = []
        self._is_sampled = {"groups": False, "completions": False, "texts": False}
        self._has_all_groups = True
        self._steps_shown: list[int] = []
        self._lost_to_size = False

    def data(self) -> list[list[dict[str, Any]]]:
        """For the page: by run its steps, each with groups of completions."""
        count = max(2, MAX_STEPS // len(self._runs))
        sizes = (run.recipe.train.prompts_per_step * run.group_size for run in self._runs)
        steps = (min(count, len(run.stored_steps)) for run in self._runs)
        self._has_all_groups = sum(map(operator.mul, sizes, steps)) <= MAX_IN_WHOLE_STEPS
        by_run = [self._steps(run, count) for run in self._runs]
        while sum(_size(step) for steps in by_run for step in steps) > MAX_BYTES and count > 1:
            count //= 2
            by_run = [evenly_spaced(steps, count) for steps in by_run]
            self._lost_to_size = True
        self._steps_shown = [len(steps) for steps in by_run]
        return by_run

    def notes(self) -> list[str]:
        """What the sample leaves out, a sentence each; to be asked after `data`."""
        notes = []
        for run, label, shown in zip(self._runs, self._labels, self._steps_shown, strict=True):
            stored = len(run.stored_steps)
            if shown < stored:
                why = f", few enough for {MAX_BYTES // 1_000_000} MB" if self._lost_to_size else ""
                which = "evenly spaced, the first and the last among them" if shown > 1 else "the last"
                notes.append(
                    f"{label}: the completions of {shown} of {stored} stored steps are here, {which}{why}."
                )
        if self._is_sampled["groups"]:
            notes.append(
                f"All groups of these steps would be more than {MAX_IN_WHOLE_STEPS} completions: of a step with "
                "more than three groups those with the lowest and the highest mean reward are here, and the one "
                "with the widest spread."
            )
        if self._is_sampled["completions"]:
            half = MAX_COMPLETIONS // 2
            notes.append(
                f"Of a group with more than {MAX_COMPLETIONS} completions the {half} of the least and the {half} "
                "of the greatest reward are here."
            )
        if self._is_sampled["texts"]:
            notes.append(
                f"Prompts and completions are cut to {MAX_CHARACTERS} characters: beginning and end stay, and the "
                "number left out stands between."
            )
        return notes + self._unreadable

    def _steps(self, run: Run, count: int) -> list[dict[str, Any]]:
        found = []
        for step in evenly_spaced(run.stored_steps, count):
            try:
                found.append({"step": step, "groups": self._groups(run, step)})
            except RunError as error:  # the others can be shown
                self._unreadable.append(f"Left out: {error}")
        return found

    def _groups(self, run: Run, step: int) -> list[dict[str, Any]]:
        """The groups of a step that are shown. Only their tokens are read: all might not fit into memory."""
        weight = weights(run)
        totals = [
            [total(one, weight) for one in group] for _, group in groupby(run.texts(step), lambda one: one.group)
        ]
        every = [ChosenGroup(place, []) for place in range(len(totals))]
        chosen = every if self._has_all_groups else chosen_groups(totals)
        self._is_sampled["groups"] |= len(chosen) < len(totals)
        samples = {one.group: chosen_samples(totals[one.group]) for one in chosen}
        places = [group * run.group_size + sample for group, own in samples.items() for sample in own]
        read = groupby(run.completions(step, places), lambda one: one.group)
        shown = {group: list(completions) for group, completions in read}
        return [
            {"of": len(totals), "reasons": one.reasons} | self._group(shown[one.group], totals[one.group])
            for one in chosen
        ]

    def _group(self, shown: list[StoredCompletion], totals: list[float | None]) -> dict[str, Any]:
        """A group of which some completions are shown, and the rewards of all."""
        self._is_sampled["completions"] |= len(shown) < len(totals)
        return {
            "group": shown[0].group,
            "size": len(totals),
            "prompt": self._said(shown[0].prompt),
            "completions": [self._completion(one, totals[one.sample]) for one in shown],
        }

    def _completion(self, one: StoredCompletion, reward: float | None) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "sample": one.sample,
            "said": self._said(one.completion),
            "reward": _number(reward),
            "rewards": [[name, _number(score)] for name, score in one.rewards.items()],
            "advantage": _number(one.advantage),
            "extras": [[name, _as_text(value)] for name, value in one.extras.items() if value is not None],
            "tokens": one.num_sampled,
            "finish": one.finish_reason,
        }
        return shown | ({"pieces": _pieces(one)} if one.token_texts else {})

    def _said(self, said: str | list[dict[str, Any]]) -> CutText | list[dict[str, Any]]:
        if isinstance(said, str):
            return self._cut(said, MAX_CHARACTERS)
        limit = max(LEAST_OF_A_MESSAGE, MAX_CHARACTERS // max(1, len(said)))
        return [self._message(message, limit) for message in said]

    def _message(self, message: dict[str, Any], limit: int) -> dict[str, Any]:
        calls = message.get("tool_calls") or []
        return {
            "role": str(message.get("role", "")),
            "name": str(message.get("name") or ""),
            "content": self._cut(_as_words(message.get("content")), limit),
            "calls": [self._cut(_as_words(call.get("function", call)), limit) for call in calls],
        }

    def _cut(self, text: str, limit: int) -> CutText:
        self._is_sampled["texts"] |= len(text) > limit
        return cut(text, limit)


def weights(run: Run) -> dict[str, float]:
    """Of the reward functions, by name; those of environments weigh 1 and are not in it."""
    return {reward.metric_name: reward.weight for reward in run.recipe.rewards}


def total(one: StoredCompletion, weight: dict[str, float]) -> float | None:
    """The weighted reward of a completion; None if nothing scored it."""
    scored = [weight.get(name, 1.0) * score for name, score in one.rewards.items() if score is not None]
    return sum(scored) if scored else None


def _pieces(one: StoredCompletion) -> dict[str, Any]:
    """The tokens of a completion's last row, the middle of long ones left out.

    `logprobs` are hundredths; `ratios`, of policy over sampler, thousandths above 1; both whole numbers or null.
    `read` has the places of those that the policy did not sample.
    """
    left_out = cut_tokens(one.token_texts)
    start, end = left_out or (len(one.token_texts), len(one.token_texts))
    kept = [*range(start), *range(end, len(one.token_texts))]
    known = token_ratios(one)
    ratios = [_scaled(None if known[place] is None else known[place] - 1, 1000) for place in kept]
    return {
        "texts": [one.token_texts[place] for place in kept],
        "logprobs": [_scaled(one.logprobs[place], 100) for place in kept],
        "ratios": ratios if any(ratio is not None for ratio in ratios) else None,
        "read": [number for number, place in enumerate(kept) if not one.sampled[place]],
        "gap": [start, end - start] if left_out else None,
    }


def _scaled(value: float | None, factor: int) -> int | None:
    return None if value is None or not math.isfinite(value) else round(value * factor)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _as_words(value: Any) -> str:
    """A message's content: a text, nothing, or parts."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _as_text(value: Any) -> CutText:
    return cut(f"{value:.6g}" if isinstance(value, float) else _as_words(value), MAX_EXTRA)


def _size(step: dict[str, Any]) -> int:
    """Bytes of a step on the page, about: those that are escaped count as they are there."""
    text = json.dumps(step, ensure_ascii=False)
    return len(text.encode("utf-8", "replace")) + 5 * sum(map(text.count, "<>&"))
