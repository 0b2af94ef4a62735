"""`python -m tests.launch.launcher PROCESSES WHAT FOLDER` runs stand-in workers, and ends as `grpo train` does."""

from __future__ import annotations

import os
import sys

from grpo_cli.distributed.environment import Nodes
from grpo_cli.errors import RunError, StoppedEarly, UserError
from grpo_cli.launch.failures import exit_code
from grpo_cli.launch.launcher import run_workers


def nodes() -> Nodes:
    """TEST_NODES holds the fields of `Nodes`, or is not set on a single machine."""
    fields = os.environ.get("TEST_NODES", "1 0 127.0.0.1 0").split()
    return Nodes(int(fields[0]), int(fields[1]), fields[2], int(fields[3]))


if __name__ == "__main__":
    try:
        run_workers("tests.launch.worker", sys.argv[2:], int(sys.argv[1]), nodes())
    except (UserError, RunError, StoppedEarly) as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code(error))
