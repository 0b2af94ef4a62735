"""The learning part of `benchmarks.gpu`: a whole run of `grpo_cli.train` whose reward has to rise."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._gpu_results import Finding, Part
from benchmarks._models import RANDOM_MODELS, letter_tokenizer, random_model
from benchmarks._report import Bar

RISE_BAR = 1.5
"""How many times its first mean reward the last one has to be."""
ENDS = 5
"""Steps that are averaged at both ends."""


@dataclass(frozen=True)
class Size:
    model: str
    steps: int
    prompts: int
    group_size: int
    completion: int
    temperature: float
    """Low, since a random model's tokens are about alike likely: each would be seen too rarely to be learnt of."""
    learning_rate: float


SIZES = {
    False: Size("random-qwen2.5-0.5b", 100, 16, 16, 32, temperature=0.15, learning_rate=2e-4),
    True: Size("random-tiny", 20, 4, 8, 12, temperature=0.3, learning_rate=1e-2),
}
"""The whole run, and a rehearsal."""


def recipe(size: Size, folder: str) -> dict[str, Any]:
    return {
        "model": {"compute_dtype": "bfloat16"},
        "generation": {
            "num_generations": size.group_size,
            "max_completion_tokens": size.completion,
            "temperature": size.temperature,
        },
        "optim": {"learning_rate": size.learning_rate},
        "train": {
            "output_dir": folder,
            "max_steps": size.steps,
            "prompts_per_step": size.prompts,
            "save_every": 0,
        },
        "logging": {"trackers": []},
    }


def prompts(tokenizer: Any, count: int, length: int) -> list[dict[str, str]]:
    words = sorted(word for word in tokenizer.get_vocab() if word.isalnum())
    source = random.Random(0)
    return [{"prompt": " ".join(source.choices(words, k=length))} for _ in range(count)]


def finding(piece: str, rewards: Sequence[float], seconds: Sequence[float]) -> Finding:
    """First steps against last ones."""
    first, last = statistics.fmean(rewards[:ENDS]), statistics.fmean(rewards[-ENDS:])
    row = [piece, str(len(rewards)), f"{first:.2f}", f"{last:.2f}", f"{statistics.median(seconds):.2f}"]
    course = ", ".join(f"{reward:.1f}" for reward in rewards[:: max(1, len(rewards) // 20)])
    return Finding([row], [Bar("mean reward, times that of the first steps", last / first, RISE_BAR)],
                   [f"Mean rewards on the way: {course}."])  # fmt: skip


def run(piece: str, device: str, rehearse: bool) -> Finding:
    import torch
    from rich.console import Console

    from grpo_cli.train.api import train
    from rewards.diversity import reward_num_unique_chars

    size = SIZES[rehearse]
    tokenizer = letter_tokenizer(RANDOM_MODELS[size.model]["vocab_size"])
    model = random_model(size.model, device, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            recipe(size, f"{folder}/run"),
            model=model,
            tokenizer=tokenizer,
            rewards=reward_num_unique_chars,
            train_data=prompts(tokenizer, 16 * size.prompts, 16),
            console=Console(width=200),
        )
    rows = result.metrics
    return finding(piece, [row["reward"] for row in rows], [row["time/step"] for row in rows])


ABOUT = f"""
`grpo_cli.train` on a Qwen2.5-0.5B shape with random weights, in bfloat16 autocast, rewarded for distinct
characters (`reward_num_unique_chars`): completions of 32 tokens, seven of eight tokens say the same character.
Mean rewards of the first and of the last {ENDS} steps.
"""

PART = Part(
    name="learn",
    title="Learning",
    about=ABOUT,
    columns=("run", "steps", "first reward", "last reward", "s a step"),
    limit_s=540,
    pieces=("qwen2.5-0.5b",),
    rehearsed=("tiny",),
    run=run,
)
