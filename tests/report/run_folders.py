"""Folders of runs that nobody trained, of any size, for tests and benchmarks of what reads them.

`python -m tests.report.run_folders FOLDER --steps 10000 --prompts 8 --group-size 8` writes one.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from grpo_cli.record.completions import (
    EXTRA_COLUMN,
    POLICY_LOGPROBS,
    REWARD_COLUMN,
    SAMPLED,
    TOKEN_TEXTS,
    completions_file,
)
from grpo_cli.record.metrics import METRICS

SAID = "the answer is seven so we add both numbers and then divide by two which gives a result that holds"
WORDS = SAID.split()
ENDS = ("stop", "stop", "stop", "length")


@dataclass(frozen=True)
class MadeUp:
    """What a run is like; every field has a default that makes a small one."""

    steps: int = 20
    prompts: int = 2
    group_size: int = 4
    tokens: int = 24
    """Of the longest completion; the shortest has half as many."""
    rewards: tuple[str, ...] = ("correct", "brief")
    prompt: str | list[dict[str, Any]] = "What is three and four?"
    text: str | None = None
    """Of every completion, as one token; words if None."""
    turns: int = 0
    """Of an episode, which calls a tool in each turn but the last; 0 for completions that are texts."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Of every completion, by name."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Sections that replace those that are made up."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further ones of every step."""
    eval_every: int = 5
    is_finished: bool = True
    has_tokens: bool = True
    """Whether token texts and the policy's log-probabilities are stored."""
    distinct_files: int | None = None
    """Files of completions that are written; the others are links to these, and say their steps. All if None."""
    seed: int = 0


def write_run(folder: Path, run: MadeUp | None = None) -> Path:
    """Write the folder of a run and return it."""
    run = run or MadeUp()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(_recipe(folder, run), sort_keys=False), encoding="utf-8")
    generator = np.random.default_rng(run.seed)
    with (folder / METRICS).open("w", encoding="utf-8") as file:
        for step in range(1, run.steps + 1):
            file.write(json.dumps(_metrics(step, run, generator)) + "\n")
    (folder / "completions").mkdir(exist_ok=True)
    distinct = min(run.steps, run.distinct_files or run.steps)
    for step in range(1, distinct + 1):
        pq.write_table(_completions(step, run, generator), completions_file(folder, step), compression="zstd")
    for step in range(distinct + 1, run.steps + 1):
        os.link(completions_file(folder, 1 + step % distinct), completions_file(folder, step))
    if run.is_finished:
        (folder / "final").mkdir(exist_ok=True)
    return folder


def _recipe(folder: Path, run: MadeUp) -> dict[str, Any]:
    made_up = {
        "model": {"name": "made-up/model"},
        "data": {"name": "made-up.jsonl"},
        "rewards": [{"path": f"my_rewards:{place}", "name": name} for place, name in enumerate(run.rewards)],
        "generation": {"num_generations": run.group_size, "max_completion_tokens": run.tokens},
        "loss": {"beta": 0.02},
        "train": {"output_dir": str(folder), "max_steps": run.steps, "prompts_per_step": run.prompts},
    }
    return made_up | run.recipe


def _metrics(step: int, run: MadeUp, generator: np.random.Generator) -> dict[str, float]:
    progress = step / run.steps
    noise = generator.normal(size=24) * 0.05
    length = run.tokens * (0.8 - 0.2 * progress + noise[0])
    reward = progress + noise[1]
    row: dict[str, float] = {"step": step, "epoch": step * 0.01, "num_tokens": step * 1000}
    row |= {
        "loss": noise[2],
        "grad_norm": 0.5 + noise[3],
        "learning_rate": 1e-6 * (1 - progress),
        "kl": progress / 9,
    }
    row |= {"entropy": 1.2 - 0.5 * progress + noise[4], "kl": progress / 9, "train/skipped_steps": 0}
    for place, end in enumerate(("low", "high", "region")):
        row[f"clip_ratio/{end}_mean"] = abs(float(noise[5 + place])) / 10
    row |= {"clip_ratio/low_min": 0.0, "clip_ratio/high_max": 0.1}
    row |= {"sampling/sampling_logp_difference/mean": 1e-3, "sampling/sampling_logp_difference/max": 1e-2}
    row |= {"completions/clipped_ratio": 0.25, "completions/mean_length": length}
    row |= {"completions/min_length": length / 2, "completions/max_length": run.tokens}
    row |= {"frac_groups_skipped": 0.1, "frac_reward_zero_std": 0.1 + 0.2 * progress, "sync/bytes": 0}
    for place, name in enumerate(run.rewards):
        row |= {f"rewards/{name}/mean": reward + float(noise[8 + place % 8]), f"rewards/{name}/std": 0.3}
    row |= {"reward": reward, "reward_std": 0.3 - 0.1 * progress}
    if run.turns:
        row |= {"rollout/turns_mean": run.turns, "tools/call_frequency": run.turns - 1, "tools/latency_s": 0.2}
    if step % run.eval_every == 0:
        row |= {
            "eval_reward": reward,
            "eval_reward_std": 0.2,
            "eval_pass@1": progress / 2,
            "eval_pass@4": progress,
        }
    row |= {"time/generate": 2 + noise[16], "time/train": 3 + noise[17], "time/reward": 0.1, "time/sync": 0.2}
    row |= {
        "time/step": row["time/generate"] + row["time/train"] + 0.3,
        "tokens_per_second": 900 + 100 * noise[18],
    }
    return {name: float(value) if name != "step" else step for name, value in (row | run.metrics).items()}


def _completions(step: int, run: MadeUp, generator: np.random.Generator) -> pa.Table:
    number = run.prompts * run.group_size
    lengths = (
        generator.integers(max(1, run.tokens // 2), run.tokens + 1, number) if run.text is None else [1] * number
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = generator.integers(0, len(WORDS), offsets[-1])
    logprobs = -generator.exponential(0.5, offsets[-1])
    texts = [run.text] * number if run.text is not None else _sentences(ids, offsets)
    scores = generator.random((len(run.rewards), number)).round(2)
    total = scores.sum(0).reshape(run.prompts, run.group_size)
    advantages = (total - total.mean(1, keepdims=True)) / (total.std(1, keepdims=True) + 1e-4)
    prompt = run.prompt if isinstance(run.prompt, str) else json.dumps(run.prompt)
    columns: dict[str, Any] = {
        "step": [step] * number,
        "prompt": [prompt] * number,
        "completion": [json.dumps(_turns(text, run.turns)) for text in texts] if run.turns else texts,
        "tokens": lengths,
        "finish_reason": [ENDS[place % len(ENDS)] for place in range(number)],
        "advantage": advantages.flatten(),
    }
    columns |= {REWARD_COLUMN.format(name=name): scores[k] for k, name in enumerate(run.rewards)}
    columns |= {EXTRA_COLUMN.format(name=name): [value] * number for name, value in run.extras.items()}
    columns["prompt_ids"] = pa.array([[1, 2, 3]] * number, pa.list_(pa.int32()))
    columns["completion_ids"] = _lists(ids.astype(np.int32), offsets)
    columns["logprobs"] = _lists(logprobs.astype(np.float32), offsets)
    if run.has_tokens:
        pieces = np.array([f"{word} " for word in WORDS] if run.text is None else [run.text], dtype=object)
        columns[TOKEN_TEXTS] = _lists(pieces[ids % len(pieces)], offsets)
        drift = generator.normal(0, 0.1, offsets[-1])
        columns[POLICY_LOGPROBS] = _lists(np.minimum(logprobs + drift, 0).astype(np.float32), offsets)
    if run.turns:
        columns["sampled"] = pa.array([[True] * int(length) for length in lengths], SAMPLED)
        columns |= {"turns": [run.turns] * number, "tool_calls": [run.turns - 1] * number}
    return pa.table(columns)


def _lists(values: Any, offsets: Any) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _sentences(ids: Any, offsets: Any) -> list[str]:
    words = [f"{WORDS[place]} " for place in ids]
    return ["".join(words[start:end]) for start, end in pairwise(offsets)]


def _turns(text: str, number: int) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": text}}}
    acted: list[dict[str, Any]] = [
        {"role": "assistant", "content": text, "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": text},
    ]
    return [*(message for _ in range(number - 1) for message in acted), {"role": "assistant", "content": text}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name in ("steps", "prompts", "group_size", "tokens", "turns", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(MadeUp(), name))
    parser.add_argument("--distinct-files", type=int)
    arguments = vars(parser.parse_args())
    print(write_run(arguments.pop("folder"), MadeUp(**arguments)))


if __name__ == "__main__":
    main()
