"""The screen of a run: a line a step, tables of completions, and on a terminal a progress bar."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from grpo_cli.errors import EXPECTED_ERRORS, one_line
from grpo_cli.record.metrics import Metrics
from grpo_cli.report.sparkline import sparkline
from grpo_cli.report.terminal import as_call, beginning, ending, step_line
from grpo_cli.rollout.engine import Completion
from grpo_cli.rollout.rollout import Rollout
from grpo_cli.train.time_left import TimeLeft, duration

SPARK_WIDTH = 24
"""Characters of the reward's course: with them the progress line fits into 80 columns."""


class Display:
    """Shows the steps of a run while it is entered as a context."""

    def __init__(self, console: Console, max_steps: int, every: int) -> None:
        self.console = console
        self.every = every
        self._time_left = TimeLeft(max_steps)
        self._rewards = array("d")
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[line]}"),
            TimeLeftColumn(self._time_left),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=max_steps, line="")
        self._max_steps = max_steps

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def resume(self, step: int, rewards: Iterable[float | None]) -> None:
        """Go on after `step`, with the mean rewards of the steps up to it."""
        self._rewards.extend(reward for reward in rewards if reward is not None)
        self._progress.update(self._task, completed=step, line=self._course())

    def step(self, metrics: Metrics) -> None:
        step, now = int(metrics["step"]), time.monotonic()
        self._time_left.step_ended(step, now, metrics["time/step"])
        if self.console.is_terminal:
            if math.isfinite(metrics["reward"]):
                self._rewards.append(metrics["reward"])
            line = f"reward {metrics['reward']:.4g} {self._course()}"
            self._progress.update(self._task, completed=step, line=line)
        if step % self.every == 0 or step == self._max_steps:
            speed = f"{metrics['tokens_per_second']:.0f} tokens/s"
            seconds = self._time_left.seconds(now)
            left = f"  {duration(seconds)} left" if seconds else ""
            self.note(f"step {step}/{self._max_steps}  {step_line(metrics)}  {speed}{left}")

    def _course(self) -> str:
        """The rewards of the run up to now, where the terminal has such characters."""
        return "" if self.console.options.ascii_only else sparkline(self._rewards, SPARK_WIDTH)

    def note(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True, highlight=False)

    @contextmanager
    def noting(self, errors: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
        """Tell in one line what fails inside, where nothing may turn a finished run into a failed one."""
        try:
            yield
        except errors as error:
            kind = "" if isinstance(error, EXPECTED_ERRORS) else f"{type(error).__name__}: "
            self.note(f"at the end of the run: {kind}{one_line(error)}")

    def completions(
        self, title: str, rollout: Rollout, names: Sequence[str], rewards: torch.Tensor, limit: int = 3
    ) -> None:
        """A table of the first completion of the first `limit` prompts with its rewards."""
        table = Table(title=title, show_lines=True)
        for column in ("prompt (end)", "completion", *names):
            table.add_column(escape(column))
        for index in range(min(limit, len(rollout.prompts))):
            row = index * rollout.num_generations
            scores = [f"{score:.3g}" for score in rewards[row].tolist()]
            completion = rollout.completions[row]
            prompt = completion.prompt or rollout.prompts[index]
            table.add_row(ending(prompt.content), conversation(completion), *scores)
        self.console.print(table)


class TimeLeftColumn(ProgressColumn):
    """How long the run still takes. Rich's own estimate forgets what is older than half a minute, as one slow step
    is, and takes the steps before a resume for steps of this process."""

    max_refresh = 0.5

    def __init__(self, time_left: TimeLeft) -> None:
        super().__init__(Column(no_wrap=True))
        self._time_left = time_left

    def render(self, task: Task) -> Text:
        """Seconds count down between two steps."""
        seconds = self._time_left.seconds(time.monotonic())
        return Text("" if seconds is None else f"{duration(seconds)} left", style="progress.remaining")


def conversation(completion: Completion) -> str:
    """The first characters of what was said, or of each message of an episode, safe to print."""
    if completion.messages is None or len(completion.messages) == 1:
        return beginning(completion.text)
    lines = []
    for message in completion.messages:
        called = [as_call(**one["function"]) for one in message.get("tool_calls", [])]
        said = [str(message["content"])] if message["content"] else []
        lines.append(f"{message.get('name') or message['role']}: {beginning(' '.join([*said, *called]))}")
    ended = "" if completion.finish_reason == "stop" else f"\n({completion.finish_reason})"
    return "\n".join(lines) + ended
