"""Whether completions end, and what their length does."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_cli.record.completions import StoredCompletion
from grpo_cli.report.curves import change, latest
from grpo_cli.report.finding import Finding
from grpo_cli.report.rules.learning import has_learned
from grpo_cli.report.run import Run

MOST = 0.5
"""Share of completions cut off at the limit: below it the reward judges whole answers most of the time."""

GAIN = 0.1
"""By how much less of them than in the first steps: the policy is on its way to end by itself."""

GROWTH = 1.5
"""Factor by which completions become longer before it is worth asking what for."""


def truncated(run: Run) -> Finding | None:
    """Most completions are cut off at the limit."""
    shares = run.series("completions/clipped_ratio")
    cut, ends = latest(shares), change(shares)
    if cut is None or cut < MOST:
        return None
    learns_to_end = ends is not None and ends.last < ends.first - GAIN
    limit = run.recipe.generation.max_completion_tokens
    unlearned = (
        ", and they are left out of the loss (loss.mask_truncated)" if run.recipe.loss.mask_truncated else ""
    )
    # Rewards of what is cut off can be learned, too: those of length or of style.
    badness = 0.3 if learns_to_end else 0.45 if has_learned(run) else 0.4 + 0.5 * min(cut, 1.0)
    return Finding(
        "truncated",
        badness,
        f"{cut:.0%} of the completions of the last steps were cut off at {limit} tokens "
        f"({ends.first if ends else cut:.0%} in the first).",
        f"What comes at the end of an answer does not count{unlearned}. {_would_end(run, limit)}",
        f"Raise generation.max_completion_tokens from {limit} to {4 * limit}, and see with grpo sample RECIPE -n "
        "4 if they end then; if none does, ask for short answers in the prompt, or reward an end.",
    )


def _would_end(run: Run, limit: int) -> str:
    """What the completions that did end say of the others."""
    if run.stored_steps:
        last = run.texts(run.stored_steps[-1])
        found = _late_ends(last, limit)
        if found is not None:
            return found
    ended = latest(run.series("completions/mean_terminated_length"))
    if not ended:
        return "None ended by itself, so whether a higher limit would do is not known."
    return f"Those that ended took {ended:.0f} tokens; how many more the others needed is not known."


def _late_ends(completions: Sequence[StoredCompletion], limit: int) -> str | None:
    """The rate at which completions end shortly before the limit; None where that is a matter of turns.

    Of those that were still going at half of the limit, some ended in its second half. If they went on to end at
    that rate, a limit four times as high, which is six more such halves, would be enough for so many of the rest.
    """
    if any(not isinstance(one.completion, str) for one in completions):
        return None
    going = [one for one in completions if one.num_sampled > limit / 2]
    ended = sum(one.finish_reason != "length" for one in going)
    if not going:
        return None
    seen = (
        f"Of {len(going)} that were still going at token {limit // 2} in step {completions[0].step}, {ended} ended"
    )
    if ended == 0:
        return f"{seen} by themselves: that a higher limit would be enough does not follow."
    rest = 1 - (1 - ended / len(going)) ** 6
    return f"{seen} by themselves; at this rate {rest:.0%} of the others would within {4 * limit} tokens."


def length_without_reward(run: Run) -> Finding | None:
    """Completions become longer, and the reward does not become higher."""
    length = change(run.series("completions/mean_length"))
    if length is None or not length.rose or length.last < GROWTH * length.first or has_learned(run):
        return None
    kind = run.recipe.loss.type
    biased = kind == "grpo"  # its mean over each completion's tokens makes a long wrong answer cheaper
    return Finding(
        "length_without_reward",
        0.5,
        f"Completions grew {length} tokens, and the reward did not rise.",
        "The policy rambles: "
        + (
            "under loss.type: grpo a wrong answer costs less per token the longer it is."
            if biased
            else "length is not what is rewarded, so it drifts, or one part of the reward pays for it."
        ),
        ("Set loss.type: dapo or dr_grpo, which weigh all tokens alike. " if biased else "")
        + "A reward function that takes off for length, with a small weight, holds it.",
    )
