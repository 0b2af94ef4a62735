"""Whether completions say the same: to other prompts, to one prompt, or what the prompt said. From a sample of
them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from grpo_cli.record.completions import StoredCompletion
from grpo_cli.report.finding import Finding
from grpo_cli.report.rules.learning import has_learned
from grpo_cli.report.run import Run

SAMPLED_STEPS = 3
"""Steps at the end of a run whose completions are read, beside the first for comparison."""

SAMPLED_GROUPS, SAMPLED_OF_GROUP = 8, 8
"""Of a step's groups, and of a group's completions, the most that are looked at."""

READ_CHARACTERS = 2000
"""Of a completion: those that are the same so far are alike."""

ALIKE = 0.8
"""Share of two texts' pairs of neighbouring characters that both have, each as often as it is there, from which
they count as the same, if their numbers are, too. Of the quickstart's first completions two have 0.17 in common at
the median, and 0.50 at most."""

COPIED, COPIED_RUN = 0.8, 8
"""Share of a completion's runs of eight characters that its prompt has, from which it is a copy. Of the
quickstart's first completions the median has 0.08."""

SHORTEST_COPY = 12
"""Characters from which a text counts as a copy: shorter ones are names and numbers, which an answer has to
repeat."""

MOST = 0.6
"""Share of pairs, or of completions, from which it is what the policy does."""

GROWN = 0.3
"""By how much more of them than in the first step: what was so from the start, the task asks for."""


@dataclass(frozen=True)
class Shares:
    """Of a sample of completions; None where there was nothing to compare."""

    across: float | None
    """Pairs of completions of different prompts that are alike."""
    within: float | None
    """Pairs of completions of one group that are alike."""
    copies: float | None
    """Completions that are a copy of a part of their prompt."""
    same: str
    """The last completion that is like one of another prompt."""
    copy: str
    """The last completion that is a copy."""


def repeated_completions(run: Run) -> Finding | None:
    """The policy says the same to every prompt, says the prompt again, or the same each time."""
    if len(run.stored_steps) < 2:
        return None
    read = run.stored_steps[1:][-SAMPLED_STEPS:]
    first = shares([_sample(run, run.stored_steps[0])])
    last = shares([_sample(run, step) for step in read])
    kinds = ((last.across, first.across), (last.copies, first.copies), (last.within, first.within))
    makers = (_same_to_all, _copies, _same_each_time)
    for (share, before), maker in zip(kinds, makers, strict=True):
        if share is not None and share >= MOST and share - (before or 0.0) >= GROWN:
            return maker(run, last, f"{before or 0.0:.0%} in step {run.stored_steps[0]}", (read[0], read[-1]))
    return None


def _same_to_all(run: Run, last: Shares, before: str, steps: tuple[int, int]) -> Finding:
    learned = has_learned(run)
    return Finding(
        "repeated_completions",
        0.85 if learned else 0.6,
        f"{last.across:.0%} of pairs of completions of different prompts say the same ({before}; "
        f"{_sampled(steps)}), such as {last.same!r}.",
        "The reward is had without reading the prompt"
        + (", and it rises: this is what the reward asks for, not the task." if learned else "."),
        "Make the reward depend on the prompt: compare with a column of the data, or take off for what other "
        f"prompts get as well; {_hold(run)} slows it down.",
        steps,
    )


def _copies(run: Run, last: Shares, before: str, steps: tuple[int, int]) -> Finding:
    learned = has_learned(run)
    return Finding(
        "repeated_completions",
        0.8 if learned else 0.55,
        f"{last.copies:.0%} of completions repeat a part of their prompt ({before}; {_sampled(steps)}), such as "
        f"{last.copy!r}.",
        "The policy says what it has read"
        + (", and the reward rises by it" if learned else "")
        + ": well if the task is to quote, else a way around it.",
        f"Take off for words of the prompt in a reward function, with a weight of its own; {_hold(run)} slows it "
        "down.",
        steps,
    )


def _same_each_time(run: Run, last: Shares, before: str, steps: tuple[int, int]) -> Finding:
    return Finding(
        "repeated_completions",
        0.3 if has_learned(run) else 0.55,
        f"{last.within:.0%} of pairs of completions of one prompt say the same ({before}; {_sampled(steps)}).",
        "A group has little to compare: the policy has made up its mind.",
        "generation.temperature: 1.0 if it is lower, loss.entropy_coef: 0.001, or a lower optim.learning_rate.",
        steps,
    )


def _sampled(steps: tuple[int, int]) -> str:
    return f"of up to {SAMPLED_OF_GROUP} of {SAMPLED_GROUPS} groups in steps {steps[0]} to {steps[1]}"


def _hold(run: Run) -> str:
    return f"loss.beta: {4 * run.recipe.loss.beta or 0.04:g}"


def _sample(run: Run, step: int) -> list[_Group]:
    """Groups from all over a step."""
    groups: dict[int, list[StoredCompletion]] = {}
    for one in run.texts(step):
        groups.setdefault(one.group, []).append(one)
    chosen = list(groups.values())
    stride = max(1, len(chosen) // SAMPLED_GROUPS)
    return [_Group.of(group[:SAMPLED_OF_GROUP]) for group in chosen[::stride][:SAMPLED_GROUPS]]


def shares(steps: Sequence[Sequence[_Group]]) -> Shares:
    """How much of a sample, of some groups of some steps, is alike."""
    within, across, copies = _Count(), _Count(), _Count()
    for groups in steps:
        for group in groups:
            for one, other in combinations(group.said, 2):
                within.add(one.is_alike(other), one.text)
            for said in group.said:
                copies.add(said.is_copy(group.runs_of_prompt), said.text)
        for group, another in combinations(groups, 2):
            if group.prompt != another.prompt:
                for one, other in zip(group.said, another.said, strict=False):
                    across.add(one.is_alike(other), one.text)
    return Shares(across.share, within.share, copies.share, across.example, copies.example)


@dataclass
class _Count:
    seen: int = 0
    found: int = 0
    example: str = ""

    def add(self, is_so: bool, text: str = "") -> None:
        self.seen += 1
        if is_so:
            self.found += 1
            self.example = text if len(text) <= 60 else text[:60] + "…"

    @property
    def share(self) -> float | None:
        return self.found / self.seen if self.seen else None


def _plain(text: str) -> str:
    """Without case and layout."""
    return re.sub(r"\s+", " ", text).strip().lower()


def _runs(text: str) -> list[str]:
    return [text[place : place + COPIED_RUN] for place in range(len(text) - COPIED_RUN + 1)]


@dataclass(frozen=True)
class _Said:
    """What two completions are compared by."""

    text: str
    plain: str
    pairs: Counter[str]
    """Of neighbouring characters; of a single one that itself."""
    numbers: list[str]

    @classmethod
    def of(cls, text: str) -> _Said:
        plain = _plain(text[:READ_CHARACTERS])
        pairs = Counter(map("".join, pairwise(plain))) or Counter([plain])
        return cls(text, plain, pairs, re.findall(r"\d+", plain))

    def is_alike(self, other: _Said) -> bool:
        """Answers of one form to different questions differ in their numbers, if they have any."""
        both, either = self.pairs & other.pairs, self.pairs | other.pairs
        return self.numbers == other.numbers and both.total() >= ALIKE * either.total()

    def is_copy(self, runs_of_prompt: frozenset[str]) -> bool:
        runs = _runs(self.plain)
        is_long = len(self.plain) >= SHORTEST_COPY
        return is_long and sum(run in runs_of_prompt for run in runs) >= COPIED * len(runs)


@dataclass(frozen=True)
class _Group:
    prompt: str
    """All that it says, with case and layout left out."""
    runs_of_prompt: frozenset[str]
    said: list[_Said]

    @classmethod
    def of(cls, completions: Sequence[StoredCompletion]) -> _Group:
        prompt = completions[0].prompt
        parts = [prompt] if isinstance(prompt, str) else [str(one.get("content") or "") for one in prompt]
        plain = _plain(" ".join(parts))
        return cls(plain, frozenset(_runs(plain)), [_Said.of(one.text) for one in completions])
