"""Which plots a report has: metrics by section, with what each says. What no section knows comes under "Other".

Names of metrics are those that `record/metrics.py` knows as the run's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    metric: str
    label: str = ""
    """In the legend of a plot with several lines."""
    spread: str | None = None
    """Metric that is drawn as a band, added and taken away."""
    low: str | None = None
    high: str | None = None
    """Metrics that bound a band."""
    is_smoothed: bool = False

    @property
    def metrics(self) -> set[str]:
        return {name for name in (self.metric, self.spread, self.low, self.high) if name}


@dataclass(frozen=True)
class Plot:
    title: str
    about: str
    lines: tuple[Line, ...]
    is_stacked: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    plots: tuple[Plot, ...]

    @property
    def metrics(self) -> set[str]:
        return {name for plot in self.plots for line in plot.lines for name in line.metrics}


NOT_PLOTTED = {"step", "epoch"}

SPREAD = "The band is one standard deviation over the completions."


def _one(title: str, about: str, metric: str) -> Plot:
    return Plot(title, about, (Line(metric),))


def _several(title: str, about: str, **labels: str) -> Plot:
    """A line for each label; names of metrics are given with `__` for `/`."""
    return Plot(title, about, tuple(Line(name.replace("__", "/"), label) for name, label in labels.items()))


def _length(title: str, about: str, kind: str = "", before: str = "") -> Plot:
    mean, low, high = (f"{before}completions/{part}_{kind}length" for part in ("mean", "min", "max"))
    return Plot(title, about, (Line(mean, low=low, high=high),))


def _reward(title: str, about: str, metric: str, spread: str, *, is_smoothed: bool = True) -> Plot:
    return Plot(title, about, (Line(metric, spread=spread, is_smoothed=is_smoothed),))


LEARNING = Section(
    "How the policy moves",
    (
        _one("KL", "To the reference model, a token.", "kl"),
        _one("Entropy", "Of the next token. A fall towards 0 means that completions become alike.", "entropy"),
        _several(
            "Clipped tokens",
            "Share whose ratio left the clip range and so gave no gradient; CISPO's, above the bound, keeps it.",
            clip_ratio__low_mean="below", clip_ratio__high_mean="above", clip_ratio__region_mean="either",
            cispo_clip_ratio="above the bound",
        ),
        _several(
            "Clipped tokens of single completions",
            "The least share below and the greatest share above, over the completions of a step.",
            clip_ratio__low_min="least below", clip_ratio__high_max="most above",
        ),
        _one("Weight of a completion", "VESPO's phi.", "vespo/phi_seq_mean"),
        _one("Gradient norm", "Before it is scaled down to optim.max_grad_norm.", "grad_norm"),
        _one("Learning rate", "Of the step's last update.", "learning_rate"),
        _one("Loss", "Of the surrogate. It says little about learning: look at the reward.", "loss"),
        _one("Skipped updates", "Optimizer steps left out: their numbers were not finite.", "train/skipped_steps"),
    ),
)  # fmt: skip

LENGTHS = Section(
    "Lengths and truncation",
    (
        _length("Tokens of a completion", "Mean; the band goes from the shortest to the longest."),
        _length("Tokens of those that ended", "The same, without those cut off at the limit.", "terminated_"),
        _one(
            "Cut off",
            "Share that hit generation.max_completion_tokens.",
            "completions/clipped_ratio",
        ),
    ),
)

GROUPS = Section(
    "Groups that teach nothing",
    (
        _one("Groups without spread", "Share whose rewards are all equal: no advantage.", "frac_reward_zero_std"),
        _one("Groups not computed", "Share left out of the forward pass for that.", "frac_groups_skipped"),
        _one("Resampling", "Rounds of generation that it took to fill the step.", "resample/rounds"),
        _one("Groups generated", "To fill the step.", "resample/generated_groups"),
    ),
)

SAMPLER = Section(
    "Sampler and policy",
    (
        _several(
            "Sampler mismatch",
            "Distance of a token's log-probabilities, under what sampled it and under the policy.",
            sampling__sampling_logp_difference__mean="mean", sampling__sampling_logp_difference__max="greatest",
        ),
        _several(
            "Sampler correction",
            "Weights that the loss is multiplied by, policy over sampler.",
            sampling__importance_sampling_ratio__min="least", sampling__importance_sampling_ratio__mean="mean",
            sampling__importance_sampling_ratio__max="greatest",
        ),
    ),
)  # fmt: skip

EPISODES = Section(
    "Turns, tools and environments",
    (
        _one("Turns", "Of the policy, an episode.", "rollout/turns_mean"),
        _one("Tool calls", "An episode.", "tools/call_frequency"),
        _one("Failed calls", "Share of all calls.", "tools/failure_frequency"),
        _one("Seconds of a call", "Mean.", "tools/latency_s"),
        _one("Unknown tools", "Calls of a name that no tool has.", "tools/unknown_name_total"),
        _one("Calls out of time", "That took longer than episode.timeout_s.", "tools/timeout_total"),
        _one("Lost episodes", "That failed and are left out.", "rollout/lost_completions"),
        _one("Seconds of a reset", "Mean, of an environment.", "env/reset_s"),
        _one("Seconds of get_reward", "All environments of the step.", "env/reward_s"),
    ),
)


def sections(names: Iterable[str], reward_names: Iterable[str]) -> list[Section]:
    """The sections of a report in order, each with plots that some of the metrics are in.

    Args:
        names: of all metrics of all runs.
        reward_names: of the reward functions of all runs.
    """
    present = dict.fromkeys(name for name in names if name not in NOT_PLOTTED)
    functions = list(reward_names)
    if len(functions) == 1:  # its numbers are those of the reward, but for its weight
        only = functions.pop()
        of_one = tuple(f"{before}rewards/{only}/" for before in ("", "eval_"))
        present = {name: None for name in present if not name.startswith(of_one)}
    known = [_rewards(functions), _held_out(present, functions), LEARNING, LENGTHS, GROUPS, _times(present)]
    known += [SAMPLER, EPISODES]
    spoken_for = {name for section in known for name in section.metrics}
    rest = [name for name in present if name not in spoken_for]
    known.append(Section("Other", tuple(_one(name, "", name) for name in rest)))
    shown = [Section(section.title, tuple(_present(section.plots, present))) for section in known]
    return [section for section in shown if section.plots]


def _present(plots: Iterable[Plot], names: Iterable[str]) -> Iterable[Plot]:
    """The plots with those of their lines that are there."""
    for plot in plots:
        lines = tuple(line for line in plot.lines if line.metric in names)
        if lines:
            yield Plot(plot.title, plot.about, lines, plot.is_stacked)


def _rewards(functions: list[str]) -> Section:
    about = f"Weighted, mean of a step. {SPREAD} The strong line is a running mean."
    plots = [_reward("Reward", about, "reward", "reward_std")]
    for name in functions:
        plots.append(_reward(name, "Reward function, unweighted.", f"rewards/{name}/mean", f"rewards/{name}/std"))
    return Section("Reward", tuple(plots))


def _held_out(present: Iterable[str], functions: list[str]) -> Section:
    passes = sorted((n for n in present if n.startswith("eval_pass@")), key=lambda name: (len(name), name))
    plots = [
        _reward("Held-out reward", f"On data.eval. {SPREAD}", "eval_reward", "eval_reward_std", is_smoothed=False),
        Plot(
            "pass@k",
            "Chance that one of k completions of a held-out prompt is correct.",
            tuple(Line(name, name.removeprefix("eval_")) for name in passes),
        ),
    ]
    for name in functions:
        mean, spread = (f"eval_rewards/{name}/{part}" for part in ("mean", "std"))
        plots.append(_reward(f"Held-out {name}", "Unweighted.", mean, spread, is_smoothed=False))
    plots.append(_length("Held-out length", "Tokens of a completion, from shortest to longest.", before="eval_"))
    found = {name for plot in plots for line in plot.lines for name in line.metrics}
    rest = [name for name in present if name.startswith("eval_") and name not in found]
    return Section("Held-out prompts", (*plots, *(_one(name, "", name) for name in rest)))


def _times(present: Iterable[str]) -> Section:
    phases = [name for name in present if name.startswith("time/") and name != "time/step"]
    stacked = tuple(Line(name, name.removeprefix("time/")) for name in phases)
    plots = (
        Plot("Time by phase", "Seconds of a step, and of the evaluation after it.", stacked, is_stacked=True),
        _one("Seconds of a step", "All phases but evaluation.", "time/step"),
        _one("Tokens per second", "Of prompts and completions, over the whole step.", "tokens_per_second"),
        _one("Tokens so far", "Of prompts and completions.", "num_tokens"),
        _one("Bytes sent", "Of weights, to what generates.", "sync/bytes"),
    )
    return Section("Time", plots)
