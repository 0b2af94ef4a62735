"""Runs stand-in workers, and ends as `grpo train` does; its arguments are PROCESSES WHAT FOLDER."""

from __future__ import annotations

import os
import sys
from typing import Any

from grpo_cli.distributed.environment import Nodes
from grpo_cli.errors import RunError, StoppedEarly, UserError
from grpo_cli.launch import failures
from grpo_cli.launch.failures import exit_code
from grpo_cli.launch.launcher import run_workers


def shorten_grace(seconds: int) -> None:
    """Let torch's agent kill workers that do not end when asked to after so many seconds, not half a minute."""
    from torch.distributed.elastic.multiprocessing.api import PContext

    close = PContext.close

    def close_sooner(context: Any, death_sig: Any = None, timeout: int = failures.AGENT_GRACE_S) -> None:
        assert timeout == 30, "what AGENT_GRACE_S says of torch"
        close(context, death_sig, seconds)

    PContext.close = close_sooner
    failures.AGENT_GRACE_S = seconds


def nodes() -> Nodes:
    """TEST_NODES holds the fields of `Nodes`, or is not set on a single machine."""
    fields = os.environ.get("TEST_NODES", "1 0 127.0.0.1 0").split()
    return Nodes(int(fields[0]), int(fields[1]), fields[2], int(fields[3]))


def main() -> None:
    if "TEST_GRACE_S" in os.environ:
        shorten_grace(int(os.environ["TEST_GRACE_S"]))
    try:
        run_workers("tests.launch.worker", sys.argv[2:], int(sys.argv[1]), nodes())
    except (UserError, RunError, StoppedEarly) as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code(error))
