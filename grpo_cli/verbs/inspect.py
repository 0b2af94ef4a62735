"""`grpo inspect`: what a run said at one step, token by token, and what training made of it. No torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_cli.errors import UserError
from grpo_cli.record.completions import StoredCompletion
from grpo_cli.report.groups import GroupSummary, groups_of
from grpo_cli.report.run import Run, read_run
from grpo_cli.report.terminal import as_call, step_line, visible
from grpo_cli.report.tokens import token_losses, token_ratios

MOST_OF_PROMPT, LEAST_OF_PROMPT = 60, 12
"""Characters of a prompt's end in the table of groups, as there is room."""

NUMBERS_WIDTH, FUNCTION_WIDTH = 68, 12
"""Columns of the terminal that the numbers of a group take, and the mean of each reward function."""

MOST_TOKENS = 5
"""Tokens of a completion that are listed."""

SAME = 1e-4
"""Ratios and losses that differ by less are not told apart: rounding makes as much."""

LIKELY = ((0.9, ""), (0.5, "green"), (0.1, "yellow"), (0.01, "red"), (0.0, "bold white on red"))
"""Least probability of a token, and its colour."""

NOT_SAMPLED, NOT_KNOWN = "dim italic", "blue"
"""Of tokens that a tool or an environment said, and of those whose probability was not told."""


def inspect(folder: Path, step: int | None, group: int | None, console: Console) -> None:
    """Print the groups of a step, or one group of it.

    Args:
        folder: of the run.
        step: counted from 1; the last that is stored if None.
        group: counted from 0; all in a table if None.
        console: to print to.

    Raises:
        UserError: it is not the folder of a run, or has no such step or group.
        RunError: a file in it is damaged.
    """
    run = read_run(folder)
    step = _stored_step(run, step)
    weights = {reward.metric_name: reward.weight for reward in run.recipe.rewards}
    groups = groups_of(run.completions(step), weights)
    if group is None:
        return _print_step(run, step, groups, console)
    if not 0 <= group < len(groups):
        raise UserError(f"--group {group}: step {step} of {folder} has {_range('group', range(len(groups)))}")
    _print_group(run, step, groups[group], console)


def _stored_step(run: Run, step: int | None) -> int:
    """Raises UserError."""
    if not run.stored_steps:
        raise UserError(f"{run.folder}: no completions are stored")
    if step is None:
        return run.stored_steps[-1]
    if step not in run.stored_steps:
        raise UserError(f"--step {step}: {run.folder} has stored {_range('step', run.stored_steps)}")
    return step


def _range(what: str, numbers: Sequence[int]) -> str:
    """`step 3`, or `steps 1 to 3`."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    gaps = ", with gaps" if numbers[-1] - numbers[0] >= len(numbers) else ""
    return f"{what}s {numbers[0]} to {numbers[-1]}{gaps}"


def _print_step(run: Run, step: int, groups: Sequence[GroupSummary], console: Console) -> None:
    row: dict[str, Any] = next((row for row in run.rows if row["step"] == step), {})
    numbers = {name: value for name, value in row.items() if value is not None}
    console.print(Text(f"{run.name}, step {step}  {step_line(numbers)}"))
    functions = list(groups[0].completions[0].rewards)
    needed = NUMBERS_WIDTH + FUNCTION_WIDTH * len(functions)
    if not console.is_terminal:  # a file has no width
        console.width = needed + MOST_OF_PROMPT
    if len(functions) == 1 or console.width < needed + LEAST_OF_PROMPT:
        functions, needed = [], NUMBERS_WIDTH
    of_prompt = min(max(console.width - needed, LEAST_OF_PROMPT), MOST_OF_PROMPT)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("group", justify="right")
    table.add_column("prompt (end)", no_wrap=True)
    for name in ("reward", "min", "max", "spread"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in functions:
        table.add_column(Text(visible(name), overflow="fold"), justify="right", width=FUNCTION_WIDTH - 2)
    table.add_column("length", justify="right", no_wrap=True)
    table.add_column("cut off", justify="right", no_wrap=True)
    table.add_column("trained", no_wrap=True)
    for group in groups:
        prompt = _ending(group.completions[0].prompt, of_prompt)
        table.add_row(str(group.group), Text(prompt), *_group_numbers(group, functions), _trained_on(group))
    console.print(table)
    hint = f"one group: grpo inspect {shlex.quote(str(run.folder))} --step {step} --group {groups[0].group}"
    console.print(Text(hint, "dim"), soft_wrap=True)


def _group_numbers(group: GroupSummary, functions: Sequence[str]) -> list[str]:
    known = group.known_rewards
    rewards = [_mean(known), min(known, default=None), max(known, default=None), group.spread]
    low, high = min(group.lengths), max(group.lengths)
    length = str(low) if low == high else f"{low}-{high}"
    return [*map(_number, [*rewards, *map(group.mean_of, functions)]), length, str(group.truncated or "-")]


def _trained_on(group: GroupSummary) -> str:
    if _is_of_older_version(group.completions):
        return "?"
    return "yes" if group.is_trained_on else "no"


def _print_group(run: Run, step: int, group: GroupSummary, console: Console) -> None:
    mean = _number(_mean(group.known_rewards))
    title = f"{run.name}, step {step}, group {group.group}  reward {mean}, spread {_number(group.spread)}"
    console.print(Text(title, "bold"))
    if _is_of_older_version(group.completions):
        console.print("An older version stored these completions: there are texts, but no single tokens.")
    elif console.color_system is not None and not console.no_color:
        console.print(_legend())
    console.print(Text("── prompt ──", "dim"))
    prompt = group.completions[0].prompt
    console.print(_conversation(prompt))
    for completion, reward in zip(group.completions, group.rewards, strict=True):
        console.print(Text(f"── completion {completion.sample} ──", "dim"))
        if completion.prompt != prompt:  # an environment has added something else to it
            console.print(Text("after ", "dim").append(_conversation(completion.prompt)))
        _print_completion(run, completion, reward, console)


def _legend() -> Text:
    legend = Text("probability when sampled: ")
    for least, style in LIKELY:
        legend.append(f" from {least:g} " if least else f" less than {LIKELY[-2][0]:g} ", style)
    return legend.append(" not told ", NOT_KNOWN).append(" not sampled ", NOT_SAMPLED)


def _print_completion(run: Run, completion: StoredCompletion, reward: float | None, console: Console) -> None:
    console.print(Text(visible("  ".join(_facts(completion, reward)))))
    if completion.extras:
        console.print(Text(visible("  ".join(f"{name}: {value}" for name, value in completion.extras.items()))))
    has_tokens = bool(completion.token_texts)
    in_one_row = sum(completion.sampled) == completion.num_sampled
    if not has_tokens or not in_one_row:
        console.print(_conversation(completion.completion))
    if not has_tokens:
        return
    if not in_one_row:
        console.print(Text("its last turn, before which the chat template wrote the history anew:", "dim"))
    console.print(_coloured(completion))
    for line in _what_training_made(run, completion):
        console.print(line)


def _facts(completion: StoredCompletion, reward: float | None) -> list[str]:
    parts = [f"{name} {_number(score)}" for name, score in completion.rewards.items()]
    each = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    facts = [f"reward {_number(reward)}{each}", f"advantage {completion.advantage + 0.0:+.3g}"]
    facts += [f"ended by {completion.finish_reason}", f"{completion.num_sampled} tokens"]
    if not isinstance(completion.completion, str):
        turns = [message for message in completion.completion if message["role"] == "assistant"]
        calls = sum(len(message.get("tool_calls") or []) for message in turns)
        facts += [f"{len(turns)} turn{'s' * (len(turns) != 1)}", f"{calls} tool call{'s' * (calls != 1)}"]
    return facts


def _coloured(completion: StoredCompletion) -> Text:
    """Its tokens, each in the colour of its probability."""
    text = Text()
    tokens = zip(completion.token_texts, completion.logprobs, completion.sampled, strict=True)
    for token, logprob, is_sampled in tokens:
        text.append(visible(token), _style(logprob) if is_sampled else NOT_SAMPLED)
    return text


def _style(logprob: float | None) -> str:
    if logprob is None:
        return NOT_KNOWN
    return next(style for least, style in LIKELY if math.exp(logprob) >= least)


def _what_training_made(run: Run, completion: StoredCompletion) -> Iterable[Any]:
    """Lines and tables of the tokens whose ratio and whose loss are the largest."""
    ratios, losses = token_ratios(completion), token_losses(completion, run.recipe.loss)
    if all(value is None for value in completion.policy_logprobs):
        yield Text("not trained on", "dim")
        return
    drifts = [None if ratio is None else abs(math.log(ratio)) for ratio in ratios]
    known = [drift for drift in drifts if drift is not None]
    if not known:
        yield Text("ratio of policy to sampler: not known, since the engine told no log-probabilities", "dim")
    elif max(known) < SAME:
        yield Text(f"ratio of policy to sampler: 1 for all tokens, to {SAME:g}", "dim")
    else:
        yield _token_table("farthest from what sampled them", completion, ratios, losses, drifts)
    of_loss = [loss for loss in losses if loss is not None]
    if of_loss and max(of_loss) - min(of_loss) < SAME:
        yield Text(f"loss: {_number(of_loss[0])} of each token", "dim")
    elif of_loss:
        yield _token_table("largest loss", completion, ratios, losses, losses)
    elif known:
        yield Text(f"loss.type {run.recipe.loss.type} is not a sum of the losses of single tokens", "dim")


def _token_table(
    title: str,
    completion: StoredCompletion,
    ratios: Sequence[float | None],
    losses: Sequence[float | None],
    size: Sequence[float | None],
) -> Table:
    """The tokens of the largest size, the largest first; places are counted from 0."""
    places = [place for place, value in enumerate(size) if value is not None]
    places.sort(key=lambda place: -(size[place] or 0.0))
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for name in ("place", "token", "log p, sampler", "log p, policy", "ratio", "loss"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for place in places[:MOST_TOKENS]:
        numbers = (completion.logprobs, completion.policy_logprobs, ratios, losses)
        token = Text(repr(completion.token_texts[place]))  # which escapes what a terminal would act on
        table.add_row(str(place), token, *[_number(values[place]) for values in numbers])
    return table


def _conversation(content: str | list[dict[str, Any]]) -> Text:
    """A text, or the messages of a conversation with their tool calls, whole."""
    if isinstance(content, str):
        return Text(visible(content))
    text = Text()
    for message in content:
        said = [str(message["content"])] if message.get("content") else []
        called = [_call(one) for one in message.get("tool_calls") or []]
        text.append(visible(f"{message.get('name') or message['role']}: "), "bold")
        text.append(visible(" ".join([*said, *called])) + "\n")
    text.rstrip()
    return text


def _call(call: Any) -> str:
    """A tool call; one that stood in a prompt may have any shape."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return str(call)
    return as_call(str(function.get("name")), function["arguments"])


def _ending(content: str | list[dict[str, Any]], most: int) -> str:
    """The last characters of a prompt, in one line."""
    text = content if isinstance(content, str) else str(content[-1].get("content"))
    text = visible(text).replace("\n", " ")
    return text if len(text) <= most else "…" + text[1 - most :]


def _is_of_older_version(completions: Sequence[StoredCompletion]) -> bool:
    """Whether there are tokens whose texts were not stored."""
    return any(one.num_sampled and not one.token_texts for one in completions)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value + 0.0:.3g}"  # nothing is -0
