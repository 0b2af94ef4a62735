"""`python -m tests.load` sends 10,000 requests to a real server and says in tables what came of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.load.run import ROUNDS, report_lines, run, serve_tiny


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a real server; nothing may be wrong, lost or left over.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=200, help="at once")
    parser.add_argument("--updates", type=int, default=100, help="of the weights, in all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="after each of which the server is measured")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grpo-load-") as name, serve_tiny(Path(name)) as (server, model):
        report = run(server, model, **vars(options), note=partial(print, file=sys.stderr, flush=True))
    print("\n".join(report_lines(report)))
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
