"""Is a step of ours the step that TRL would have taken? TRL trains; ours trains on TRL's own completions.

Both start from the same weights. For each step: how far our reward, loss, gradient before and after clipping and
weights are from TRL's. What remains is rounding: TRL computes padded rows, we compute shared prompts.

    python -m benchmarks.updates_vs_trl [--recipe FILE] [--steps 5] [--seed 42] [--markdown FILE]

Needs 1.6 GB of disk for each step of SmolLM2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks._replayers import Spec
from benchmarks._report import Report
from benchmarks._workers import Message, Worker, WorkerError

MODULE = "benchmarks._replayers"
COLUMNS = {
    "reward": "reward",
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "gradient": "gradient, relative",
    "worst_gradient": "of the worst parameter",
    "clipped": "clipped gradient, relative",
    "update": "change of the weights, relative",
    "weight": "mean of a weight",
}
"""Key of a difference to its column."""


def differences(options: argparse.Namespace, folder: str) -> list[Message]:
    """Train with TRL, then with ours on the same completions."""
    theirs = Spec("TRL", options.recipe, options.seed, options.steps, folder, "cpu")
    with Worker(MODULE, asdict(theirs), options.threads):
        pass  # it is ready when it has trained
    ours = Spec("ours", options.recipe, options.seed, options.steps, folder, "cpu")
    with Worker(MODULE, asdict(ours), options.threads) as worker:
        return [worker.ready, *(worker.ask() for _ in range(options.steps - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            steps = differences(options, folder)
    except WorkerError as error:
        sys.exit(str(error))
    rows = [[str(index + 1), *(f"{step[key]:.2g}" for key in COLUMNS)] for index, step in enumerate(steps)]
    report = Report()
    report.table(f"our step minus TRL's, {options.recipe}", ["step", *COLUMNS.values()], rows)
    report.write(options.markdown)


if __name__ == "__main__":
    main()
