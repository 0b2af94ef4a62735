"""A stand-in for a training process: `python -m tests.launch.worker WHAT FOLDER`, where WHAT happens to it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from grpo_cli.errors import RunError, StoppedEarly, UserError
from grpo_cli.launch.failures import reported
from grpo_cli.train.signals import StopRequest

RANK = int(os.environ.get("RANK", "0"))


def write(folder: Path, kind: str, value: object) -> None:
    partial = folder / f".{kind}-{RANK}"
    partial.write_text(json.dumps(value))
    partial.rename(folder / f"{kind}-{RANK}")


def barrier(folder: Path, kill: int | None = None) -> None:
    """Meet over gloo until the other side is gone; the rank `kill` never comes."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    write(folder, "pid", os.getpid())
    while kill == RANK:
        time.sleep(0.1)
    dist.barrier()


def hang() -> NoReturn:
    """Like a collective whose other side is gone: a request to stop changes nothing."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(0.1)


def train(folder: Path) -> None:
    """Wait for a request to stop, then say how many signals came."""
    with StopRequest() as request:
        write(folder, "pid", os.getpid())
        while request.name is None:
            time.sleep(0.02)
        print(f"rank {RANK} got {request.name}", flush=True)
        time.sleep(1)  # the checkpoint, in which a repeated signal does no harm
        write(folder, "checkpoint", request.name)
    while len(list(folder.glob("checkpoint-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.02)
    raise StoppedEarly("stopped by a signal with a checkpoint")


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    with reported():
        if what == "ranks":
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_PORT")
            names += ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION")
            write(folder, "environment", {name: os.environ.get(name) for name in names})
        elif what == "wrong":
            raise UserError("recipe.yaml:3: loss.epsilom is not a setting")
        elif what == "failed":
            raise RunError("the disk is full")
        elif what == "bug" and RANK == 1:
            raise ValueError("tensors are\nnot equal")
        elif what == "bug-and-lost-contact":
            if RANK == 1:
                time.sleep(0.5)
                raise ValueError("the cause")
            raise RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2442")
        elif what == "exit":
            sys.exit(7 if RANK == 1 else 0)
        elif what == "barrier":
            barrier(folder, kill=1)
        elif what == "bug-while-others-hang" and RANK == 1:
            raise ValueError("the cause")
        elif what == "train":
            train(folder)
        elif what == "hang-after-signal":
            with StopRequest() as request:
                write(folder, "pid", os.getpid())
                while True:
                    time.sleep(0.02)
                    if request.name is not None and not (folder / f"signalled-{RANK}").exists():
                        write(folder, "signalled", request.name)
        if what in ("bug", "bug-while-others-hang", "hang"):
            write(folder, "pid", os.getpid())
            hang()


if __name__ == "__main__":
    main()
