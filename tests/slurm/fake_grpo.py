"""Stands in for `grpo` where a test is about the job script: the same signals, files and exit codes, no model.

FAKE in the environment says what goes wrong: serve-fails, serve-dies, train-fails, no-progress.
"""

from __future__ import annotations

import http.server
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

KEY = "k" * 20
STEPS = 8


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if os.environ.get("FAKE") == "serve-dies" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            signal.setitimer(signal.ITIMER_REAL, 2)
        is_asked_right = self.headers["Authorization"] == f"Bearer {KEY}" and self.path == "/v1/grpo/info"
        self.send_response(200 if is_asked_right else 401)
        self.end_headers()


def serve(arguments: list[str]) -> None:
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    if os.environ.get("FAKE") == "serve-fails":
        sys.exit("grpo serve: no such model")
    time.sleep(1)
    Path(options["--api-key-file"]).write_text(f"{KEY}\n")
    http.server.ThreadingHTTPServer((options["--host"], int(options["--port"])), Server).serve_forever()


def train(arguments: list[str]) -> None:
    rank, fault = int(os.environ["SLURM_PROCID"]), os.environ.get("FAKE")
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    folder = Path(settings["train.output_dir"].strip("'"))
    step = max([int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")], default=0)
    signals: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    print(f"rank {rank} of {os.environ['SLURM_STEP_NUM_TASKS']} from step {step}", flush=True)
    while step < STEPS:
        time.sleep(0.4)
        step += 1
        if fault == "train-fails" and step == 2 and rank == 1:
            sys.exit(3)
        if fault == "train-fails" and step == STEPS:
            time.sleep(600)  # as one does that waits for another
        if signals:
            time.sleep(rank)  # nodes do not end at the same time
            if rank == 0 and fault != "no-progress":
                (folder / f"checkpoint-{step:06d}").mkdir(exist_ok=True)
            print(f"stopped after step {step}, signals: {len(signals)}", flush=True)
            sys.exit(75)
    print(f"done after step {step}", flush=True)


def main(verb: str, arguments: list[Any]) -> None:
    print(f"{verb} on {os.uname().nodename}: {' '.join(arguments)}", flush=True)
    {"serve": serve, "train": train}[verb](arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
