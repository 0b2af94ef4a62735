"""`python -m tests.soak --steps 2000` trains a tiny model and says in a table what grew; exit 1 if any did."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.conftest import byte_tokenizer, tiny_llama
from tests.soak.growth import table
from tests.soak.run import SYSTEMS, soak


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny model for long; see whether anything grows.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--system", choices=SYSTEMS, default="full")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grpo-soak-") as name:
        model = Path(name) / "model"
        tiny_llama().save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        trends = soak(model, Path(name), options.system, options.steps)
    print(f"{options.system}, {options.steps} steps\n")
    print("\n".join(table(trends, options.steps)))
    sys.exit(any(found.grows for found in trends))


if __name__ == "__main__":
    main()
