"""Runs in memory, made of curves and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_cli.recipe.load import load_recipe
from grpo_cli.record.completions import StoredCompletion
from grpo_cli.report.run import Run

STEPS = 24
Curve = float | Sequence[float | None] | None

RECIPE: dict[str, Any] = {
    "model": {"name": "model"},
    "data": {"name": "prompts.jsonl", "eval": {"name": "held-out.jsonl", "limit": 200}},
    "rewards": ["rewards.length:reward_len"],
    "loss": {"beta": 0.01},
    "train": {"output_dir": "run", "max_steps": STEPS, "prompts_per_step": 4, "eval_every": 6},
}


@dataclass(frozen=True)
class MadeUpRun(Run):
    said: Mapping[int, list[StoredCompletion]] = field(default_factory=dict)
    """Completions by step."""

    @cached_property
    def stored_steps(self) -> list[int]:
        return sorted(self.said)

    def completions(self, step: int, places: Sequence[int] | None = None) -> list[StoredCompletion]:
        return self.said[step] if places is None else [self.said[step][place] for place in places]

    def texts(self, step: int) -> list[StoredCompletion]:
        return self.said[step]


def ramp(first: float, last: float, steps: int = STEPS) -> list[float]:
    """A straight line with a little noise."""
    noise = 0.03 * max(abs(first), abs(last))
    return [first + (last - first) * step / (steps - 1) + noise * (-1) ** step for step in range(steps)]


def seldom(*values: float) -> list[float | None]:
    """Values every so many steps, of which the last is one."""
    every = STEPS // len(values)
    return [values[step // every] if step % every == every - 1 else None for step in range(STEPS)]


WELL: dict[str, Curve] = {
    "reward": ramp(0.2, 0.6),
    "reward_std": 0.3,
    "rewards/reward_len/mean": ramp(0.2, 0.6),
    "rewards/reward_len/std": 0.3,
    "frac_reward_zero_std": ramp(0.0, 0.3),
    "frac_groups_skipped": ramp(0.0, 0.3),
    "entropy": ramp(1.0, 0.6),
    "kl": ramp(0.001, 0.2),
    "clip_ratio/region_mean": 0.02,
    "grad_norm": ramp(0.8, 1.5),
    "learning_rate": 1e-6,
    "loss": 0.01,
    "sampling/sampling_logp_difference/mean": 0.01,
    "train/skipped_steps": 0,
    "completions/clipped_ratio": 0.1,
    "completions/mean_length": ramp(100, 130),
    "completions/mean_terminated_length": ramp(90, 110),
    "time/generate": 6.0,
    "time/train": 3.0,
    "time/reward": 0.5,
    "time/sync": 0.5,
    "time/step": 10.0,
    "eval_reward": seldom(0.25, 0.4, 0.5, 0.55),
    "eval_reward_std": seldom(0.3, 0.3, 0.3, 0.3),
}
"""A run that learns, and with which nothing is wrong."""


def made_up(
    changes: Mapping[str, Curve] | None = None,
    recipe: Mapping[str, Any] | None = None,
    said: Mapping[int, list[StoredCompletion]] | None = None,
) -> MadeUpRun:
    """A run that is well, but for some curves (None: the metric is not there) and sections of its recipe."""
    curves = WELL | dict(changes or {})
    columns = {
        name: [float(curve)] * STEPS if isinstance(curve, (int, float)) else list(curve)
        for name, curve in curves.items()
        if curve is not None
    }
    rows = [
        {"step": step + 1} | {name: column[step] for name, column in columns.items() if column[step] is not None}
        for step in range(STEPS)
    ]
    sections = {
        name: RECIPE.get(name, {}) | section for name, section in (recipe or {}).items() if name != "rewards"
    }
    whole = RECIPE | sections | {"rewards": (recipe or {}).get("rewards", RECIPE["rewards"])}
    return MadeUpRun(Path("runs/made-up"), load_recipe(whole), rows, True, said or {})


def say(step: int, texts: Sequence[Sequence[str]], **changes: Any) -> list[StoredCompletion]:
    """The completions of a step: of each prompt some texts."""
    fields: dict[str, Any] = {
        "num_sampled": 8,
        "finish_reason": "stop",
        "advantage": 0.0,
        "rewards": {},
        "extras": {},
        "token_ids": [],
        "token_texts": [],
        "logprobs": [],
        "policy_logprobs": [],
        "sampled": [],
    }
    return [
        StoredCompletion(
            **{"prompt": f"prompt {group}", **fields, **changes},
            step=step,
            group=group,
            sample=sample,
            completion=text,
        )
        for group, of_group in enumerate(texts)
        for sample, text in enumerate(of_group)
    ]
