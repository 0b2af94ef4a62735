"""What a checkpoint's manifest costs: saves with and without checksums in turns, and the check on a resume.

    python -m benchmarks.checkpoint [--folder DIR] [--model MODEL] [--repeats 5]

The folder decides: its disk is what a save waits for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks._models import DEFAULT_MODEL
from benchmarks._report import Bar
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies.replicated import Replicated
from grpo_cli.policy.load import load_policy, load_tokenizer
from grpo_cli.recipe.schema import ModelConfig, OptimConfig
from grpo_cli.train import whole_files
from grpo_cli.train.checkpoint import Position, save_checkpoint
from grpo_cli.train.manifest import FileSum, faults, sum_of
from grpo_cli.train.optim import build_optimizer, build_scheduler

LARGEST_SHARE = 0.05
"""Of a save."""


def learner_of(model_name: str) -> Any:
    """What a checkpoint is made of, after a step."""
    config, optim = ModelConfig(name=model_name), OptimConfig()
    model = load_policy(config)
    optimizer = build_optimizer(model, optim, torch.Tensor.size)
    strategy = Replicated(Ranks(), optim.max_grad_norm)
    strategy.prepare(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)  # zeros would be no test of a disk that compresses
    optimizer.step()
    optimizer.zero_grad()
    scheduler, tokenizer = build_scheduler(optimizer, optim, 10), load_tokenizer(config)
    return SimpleNamespace(ranks=Ranks(), strategy=strategy, model=model, tokenizer=tokenizer, scheduler=scheduler)


def without_checksum(path: Path) -> FileSum:
    return FileSum(path.stat().st_size, "")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is meant; the system's temporary one if not given"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    learner = learner_of(given.model)
    times: dict[str, list[float]] = {"with": [], "without": [], "verified": []}
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for step in range(1, 2 * given.repeats + 3):  # the first of each kind is not counted
            kind = "with" if step % 2 == 0 else "without"
            path = folder / f"checkpoint-{step:06d}"
            with patch.object(whole_files, "sum_of", sum_of if kind == "with" else without_checksum):
                took = seconds(lambda step=step: save_checkpoint(folder, learner, Position(step), 1, print))  # type: ignore[misc]
            if step > 2:
                times[kind].append(took)
            if kind == "with":
                times["verified"].append(seconds(lambda path=path: faults(path)))  # type: ignore[misc]
        size = sum(file.stat().st_size for file in path.iterdir())
    middle = {kind: statistics.median(values) for kind, values in times.items()}
    print(f"{size / 1e9:.2f} GB; " + ", ".join(f"{kind} {value:.2f} s" for kind, value in middle.items()))
    print(
        *(f"{kind}: " + " ".join(f"{value:.2f}" for value in values) for kind, values in times.items()), sep="\n"
    )
    print(Bar("share of a save", middle["with"] / middle["without"] - 1, LARGEST_SHARE, at_most=True))


if __name__ == "__main__":
    main()
