"""`grpo serve` on this machine: what an update of its weights costs, and how fast it generates.

An update is set beside one plain memory copy of as many bytes; the server's tokens per second beside those of our
embedded engine and of transformers' `generate` on the same prompts and lengths. All take turns in one run.

    python -m benchmarks.serve [--shapes 50x200,300x32] [--repeats 3] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._machine import MachineProbe
from benchmarks._models import DEFAULT_MODEL, Shape, as_prompts, load, parse_shapes, random_prompts
from benchmarks._report import Bar, Report
from benchmarks._workers import WORKER_FLAG, Channel, Message, Worker
from benchmarks.generation import Result, Spec

UPDATE_BAR = 10.0
"""Times the plain copy that an update may take on the same host."""

SPEED_BAR = 1.2
"""Times the tokens per second of `generate` that the server must reach."""


def serve() -> None:
    """Be the trainer of a server of its own: update it, copy memory, or generate, as asked."""
    import torch

    from grpo_cli.recipe.schema import GenerationConfig, ServerConfig
    from grpo_cli.rollout.policy_weights import PolicyWeights
    from grpo_cli.rollout.server.connection import ServerConnection
    from grpo_cli.rollout.server.engine import ServerEngine
    from grpo_cli.rollout.server.spawned_server import SpawnedServer

    channel = Channel()
    options = channel.receive()
    model, tokenizer = load(options["model"])
    model.to(options["device"])
    config = ServerConfig(spawn=True)
    with tempfile.TemporaryDirectory() as folder:
        spawned = SpawnedServer(model, tokenizer, config, options["vllm"], Path(folder, "server.log"))
        spawned.ensure_running()
        server = ServerConnection(spawned.url, spawned.key, config.timeout_s)
        calls: list[str] = []
        server._http.event_hooks = {"request": [lambda request: calls.append(request.url.path)]}
        weights = PolicyWeights(model)
        engine = ServerEngine([server], weights, tokenizer, GenerationConfig(), set(), spawned=spawned)
        try:
            version, size = 0, engine.update_weights(0)
            source = torch.ones(size, dtype=torch.uint8)
            target = torch.zeros_like(source)
            channel.send(bytes=size, tensors=len(weights.specs("float32")))
            while True:
                request = channel.receive()
                calls.clear()
                start = time.perf_counter()
                lengths: list[int] = []
                if request["what"] == "copy":
                    target.copy_(source)
                elif request["what"] == "update":
                    version += 1
                    engine.update_weights(version)
                else:
                    lengths = generate(engine, tokenizer, request)
                channel.send(seconds=time.perf_counter() - start, lengths=lengths, calls=len(calls), peak=0)
        finally:
            engine.close()


def generate(engine: Any, tokenizer: Any, request: Message) -> list[int]:
    """One rollout of forced length; the lengths of its completions."""
    from grpo_cli.episode.driver import Driver

    texts = random_prompts(tokenizer, request["prompts"], request["prompt"], seed=1)
    prompts = tokenizer(texts)["input_ids"]
    keys = [(request["round"], index) for index in range(len(prompts))]
    groups = Driver(engine, request["completion"]).generate(as_prompts(prompts), keys, request["group_size"])
    return [len(completion.token_ids) for group in groups for completion in group]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="weight updates and speed of grpo serve")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id, or a random-… name")
    parser.add_argument("--shapes", default="50x200,300x32", help="prompt and completion tokens")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="write the tables there, too")
    options = parser.parse_args()
    options.shapes = parse_shapes(options.shapes)
    return options


def measure_speed(options: argparse.Namespace, server: Worker, shape: Shape) -> dict[str, Result]:
    """Rollouts of all three in turns."""
    spec = Spec("", options.model, options.device, options.prompts, options.num_generations, *vars(shape).values())
    answers: dict[str, list[Message]] = {"server": [], "embedded": [], "generate": []}
    others = {
        name: Worker("benchmarks.generation", asdict(spec) | {"system": system}, options.threads)
        for name, system in (("embedded", "ours"), ("generate", "generate"))
    }
    try:
        for round_ in range(options.repeats):
            answers["server"].append(server.ask(what="generate", round=round_, **asdict(spec)))
            for name, worker in others.items():
                answers[name].append(worker.ask())
            seconds = {name: f"{got[-1]['seconds']:.1f} s" for name, got in answers.items()}
            print(f"{shape}: {seconds}", file=sys.stderr)
    finally:
        for worker in others.values():
            worker.close()
    return {name: Result(got) for name, got in answers.items()}


def main() -> None:
    options = parse_options()
    probe = MachineProbe(options.device, options.threads)
    server = Worker(
        "benchmarks.serve", {"model": options.model, "device": options.device, "vllm": {}}, options.threads
    )
    report = Report()
    try:
        updates, copies = [], []
        for _ in range(max(5, options.repeats)):
            copies.append(server.ask(what="copy")["seconds"])
            updates.append(server.ask(what="update"))
        speeds = [(shape, measure_speed(options, server, shape)) for shape in options.shapes]
        probe.measure()
        machine = probe.machine
    finally:
        server.close()
        probe.close()
    size, tensors = server.ready["bytes"], server.ready["tensors"]
    copy, update = statistics.median(copies), statistics.median(answer["seconds"] for answer in updates)
    calls = sorted({answer["calls"] for answer in updates})
    report.table(
        f"{options.model}: one update, medians of {len(updates)}",
        ("what", "HTTP calls", "MB", "seconds", "GB/s"),
        [
            ("memory copy", "", f"{size / 1e6:.0f}", f"{copy:.3f}", f"{size / copy / 1e9:.1f}"),
            (f"update of {tensors} tensors", f"{calls}", f"{size / 1e6:.0f}", f"{update:.3f}",
             f"{size / update / 1e9:.1f}"),
        ],
    )  # fmt: skip
    rows = [
        [str(shape), name, f"{result.median(lambda answer: answer['seconds']):.1f}", f"{result.rate:.1f}",
         f"{results['server'].rate / result.rate:.2f}×"]
        for shape, results in speeds
        for name, result in results.items()
    ]  # fmt: skip
    title = f"{options.prompts} prompts × {options.num_generations} completions, medians of {options.repeats}"
    report.table(title, ("shape", "engine", "seconds", "tokens/s", "server is"), rows)
    report.lines(machine.line())
    bars = [Bar("update over plain copy", update / copy, UPDATE_BAR, at_most=True)]
    for shape, results in speeds:
        ratio = results["server"].rate / results["generate"].rate
        bars.append(Bar(f"server over generate, {shape}", ratio, SPEED_BAR))
    report.lines(*map(str, bars))
    report.write(options.markdown)


if __name__ == "__main__":
    serve() if WORKER_FLAG in sys.argv else main()
