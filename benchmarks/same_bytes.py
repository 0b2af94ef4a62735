"""Does a change of the code change a run? Four short runs of the real command, and a digest of what each leaves.

What is digested is `metrics.jsonl` without its times, key order included, and every file of `final/`. Run it
before and after a change that is meant to change nothing, and compare:

    python -m benchmarks.same_bytes runs/before && git switch other && python -m benchmarks.same_bytes runs/after
    diff runs/before/digests.txt runs/after/digests.txt

Needs `make model vllm`. Takes five minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

RECIPE = "recipes/quickstart.yaml"
SHORT = ["generation.max_completion_tokens=16", "generation.num_generations=4", "train.prompts_per_step=3"]
RUNS = {
    "quickstart": ([], []),
    "lora": (
        [
            *SHORT, "model.lora={r: 8}", "loss.beta=0.05", "train.num_iterations=2",
            "train.optimizer_steps_per_rollout=2",
        ],
        [],
    ),
    "zero3": ([*SHORT, "distributed.strategy=zero3"], ["--processes", "2"]),
    "server": ([*SHORT, "generation.engine=vllm_server", "generation.server={spawn: true}"], []),
}  # fmt: skip
"""Settings and further options of each run."""

TIMES = ("time/", "tokens_per_second")


def digests(run: Path) -> list[str]:
    """A line for the metrics and for each file of the final model."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]
    found = {"metrics": hashlib.sha256(json.dumps(kept).encode()).hexdigest()}
    for path in sorted((run / "final").iterdir()):
        found[f"final/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return [f"{run.name} {name} {digest}" for name, digest in found.items()]


def train(name: str, folder: Path, steps: int) -> None:
    settings, options = RUNS[name]
    settings = [*settings, f"train.max_steps={steps}", f"train.output_dir={folder}", "logging.trackers=[]"]
    sets = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "grpo_cli.cli", "train", RECIPE, *sets, *options]
    # With several threads vLLM adds in an order that changes from run to run.
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", default=",".join(RUNS), help="which of them")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    lines = []
    for name in options.runs.split(","):
        train(name, options.folder / name, options.steps)
        lines += digests(options.folder / name)
    (options.folder / "digests.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{options.folder / 'digests.txt'}: {len(lines)} digests")


if __name__ == "__main__":
    main()
