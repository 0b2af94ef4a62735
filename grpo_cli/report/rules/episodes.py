"""Whether tools and environments did their part."""

from __future__ import annotations

from grpo_cli.report.curves import known, latest, mean
from grpo_cli.report.finding import Finding
from grpo_cli.report.run import Run

OFTEN = 0.3
"""Share of calls that may fail while a model learns to call."""


def failing_tools(run: Run) -> Finding | None:
    """Calls fail, or name tools that are not there."""
    failed = latest(run.series("tools/failure_frequency"))
    if failed is None or failed < OFTEN:
        return None
    calls = (mean(run.series("tools/call_frequency")) or 0.0) * run.recipe.train.prompts_per_step * run.group_size
    unknown = sum(known(run.series("tools/unknown_name_total")))
    late = sum(known(run.series("tools/timeout_total")))
    named = f", {unknown:.0f} calls of the run named no tool that there is" if unknown else ""
    slow = f", {late:.0f} took longer than episode.timeout_s ({_timeout(run):g} s)" if late else ""
    advice = "Read what they were told: the messages of role tool in completions/, or grpo sample RECIPE -n 4. "
    if unknown:
        advice += "Name the tools and their arguments in data.system_prompt. "
    if late:
        advice += f"Set episode.timeout_s: {2 * _timeout(run):g}, or make the tool faster. "
    return Finding(
        "failing_tools",
        0.3 + 0.5 * min(failed, 1.0),
        f"{failed:.0%} of the calls of the last steps failed (some {calls:.0f} calls a step){named}{slow}.",
        "The policy plays with tools that do not answer, or has not learned how to call them.",
        advice.strip(),
    )


def unused_tools(run: Run) -> Finding | None:
    """There are tools, and the policy does not call them."""
    calls = known(run.series("tools/call_frequency"))
    episode = run.recipe.episode
    if episode is None or not episode.tools or len(calls) < 2 or sum(calls) > 0:
        return None
    return Finding(
        "unused_tools",
        0.6,
        f"No tool was called in {len(calls)} steps.",
        "What is never tried is never rewarded: the model does not know of the tools, or its chat template does "
        "not show them.",
        "See what grpo check RECIPE says of the template; ask for a call in data.system_prompt, with an example.",
    )


def lost_episodes(run: Run) -> Finding | None:
    """Environments could not be reset."""
    steps, counts = run.points("rollout/lost_completions")
    lost = sum(known(counts))
    if lost <= 0:
        return None
    total = max(len(run.rows) * run.recipe.train.prompts_per_step * run.group_size, lost)
    when = [step for step, count in zip(steps, counts, strict=True) if count]
    return Finding(
        "lost_episodes",
        min(0.25 + lost / total, 0.9),
        f"{lost:.0f} of {total:.0f} completions were lost, the first in step {when[0]}: their environments could "
        "not be reset.",
        "Their groups have no part in what is learned.",
        "The notes on the screen of the run name the error; a server behind the environment may hold fewer "
        "sessions than episode.workers asks for.",
        (when[0], when[-1]),
    )


def _timeout(run: Run) -> float:
    return run.recipe.episode.timeout_s if run.recipe.episode is not None else 0.0
