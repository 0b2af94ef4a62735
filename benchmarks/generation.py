"""Our embedded engine against transformers' `generate` and its continuous batching, in turns in one run.

All three generate as many completions of the same prompts from the same weights, of a forced length. In the ragged
case no engine can be told a length for each completion: there every token ends its completion with the same
probability, 1 / `--mean-length`, up to 200 tokens. The lengths differ by luck, so compare rates.

    python -m benchmarks.generation [--device cuda] [--shapes 300x32,50x200] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks._machine import Machine, MachineProbe
from benchmarks._models import DEFAULT_MODEL, ModelSize, Shape, as_prompts, load, parse_shapes, random_prompts
from benchmarks._report import Report
from benchmarks._workers import WORKER_FLAG, Channel, Message, Worker, WorkerError, peak_memory

MODULE = "benchmarks.generation"
SYSTEMS = ("ours", "generate", "continuous")
DEFAULTS = {
    "cpu": (DEFAULT_MODEL, "300x32,100x100,50x200", 4),
    "cuda": ("random-qwen2.5-0.5b", "1024x128", 8),
}
"""Model, shapes and prompts on each device."""
PAGE = 32
"""Tokens of a page of the continuous batching's cache on a CPU; the default of 256 leaves most of it empty."""


@dataclass(frozen=True)
class Spec:
    """What a worker generates when asked."""

    system: str
    model: str
    device: str
    prompts: int
    group_size: int
    prompt: int
    completion: int
    """Tokens of each completion, or the most where they are ragged."""
    mean_length: int = 0
    """Of ragged completions; 0 for completions of `completion` tokens."""


Rollout = Callable[[], list[int]]
"""Generates once and returns the length of each completion."""


@contextmanager
def ending_at_random(model: Any, spec: Spec) -> Iterator[int]:
    """Let every token be the end with probability 1 / mean_length; yields the token that ends a completion.

    With forced lengths it is a number that no token has.
    """
    import torch

    if not spec.mean_length:
        yield model.config.vocab_size
        return
    end = model.config.vocab_size - 1
    odds = math.log(1 / (spec.mean_length - 1))

    def overwrite(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., end] = -torch.inf
        logits[..., end] = logits.logsumexp(-1) + odds
        return logits

    hook = model.get_output_embeddings().register_forward_hook(overwrite)
    try:
        yield end
    finally:
        hook.remove()


def our_engine(spec: Spec, model: Any, tokenizer: Any, prompts: list[list[int]], end: int) -> Rollout:
    import torch

    from grpo_cli.episode.driver import Driver
    from grpo_cli.policy.logprobs import PackedModel
    from grpo_cli.recipe.schema import GenerationConfig, ModelConfig
    from grpo_cli.rollout.embedded.engine import EmbeddedEngine
    from grpo_cli.train.guards import autocast_for

    config = GenerationConfig(num_generations=spec.group_size, max_completion_tokens=spec.completion)
    autocast = autocast_for(ModelConfig(name=spec.model), torch.device(spec.device))
    embedded = EmbeddedEngine(PackedModel.checked(model), tokenizer, config, autocast)
    embedded.eos_token_ids = {end}
    engine = Driver(embedded, spec.completion)
    rounds = iter(range(sys.maxsize))

    def rollout() -> list[int]:
        step = next(rounds)
        keys = [(step, index) for index in range(len(prompts))]
        groups = engine.generate(as_prompts(prompts), keys, spec.group_size)
        return [len(completion.token_ids) for group in groups for completion in group]

    return rollout


def plain_generate(spec: Spec, model: Any, tokenizer: Any, prompts: list[list[int]], end: int) -> Rollout:
    """As GRPOTrainer calls it: every prompt as often as it has completions."""
    import torch

    config = generation_config(spec, end)
    model.eval()
    input_ids = torch.tensor(prompts, device=spec.device).repeat_interleave(spec.group_size, 0)
    mask = torch.ones_like(input_ids)

    def rollout() -> list[int]:
        with torch.no_grad(), torch.autocast(spec.device, torch.bfloat16, enabled=spec.device == "cuda"):
            output = model.generate(input_ids, attention_mask=mask, generation_config=config)
        completions = output[:, spec.prompt :]
        ended = (completions == end).int()
        first_end = torch.where(ended.any(1), ended.argmax(1) + 1, completions.shape[1])
        lengths: list[int] = first_end.tolist()
        return lengths

    return rollout


def continuous_batching(spec: Spec, model: Any, tokenizer: Any, prompts: list[list[int]], end: int) -> Rollout:
    """Each prompt is computed once and forked; on a CPU the cache is as large as it has to be."""
    import torch
    from transformers import ContinuousBatchingConfig

    config = generation_config(spec, end)
    config.num_return_sequences = spec.group_size
    rows = spec.prompts * spec.group_size
    settings = {}
    if spec.device == "cpu":
        pages = rows * math.ceil((spec.prompt + spec.completion) / PAGE) + 8
        settings = {"page_size": PAGE, "num_blocks": pages, "max_batch_tokens": max(1024, spec.prompt)}
    model.eval()

    def rollout() -> list[int]:
        batching = ContinuousBatchingConfig(**settings, max_requests_per_batch=rows)
        with torch.no_grad():
            outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        errors = [output.error for output in outputs.values() if output.error]
        if errors or len(outputs) != rows:
            raise RuntimeError(f"{len(outputs)} of {rows} completions; {errors[:1]}")
        return [len(output.generated_tokens) for output in outputs.values()]

    return rollout


def generation_config(spec: Spec, end: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=spec.completion,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=end,
        pad_token_id=0,
        disable_compile=True,
    )


def serve() -> None:
    """Be the worker that the first message asks for."""
    import torch

    channel = Channel()
    spec = Spec(**channel.receive())
    model, tokenizer = load(spec.model)
    if spec.device == "cuda" and spec.system == "continuous":
        model.to(torch.bfloat16)  # it runs in a thread of its own, which no autocast reaches
    model.to(spec.device)
    prompts = tokenizer(random_prompts(tokenizer, spec.prompts, spec.prompt, seed=1))["input_ids"]
    build = {"ours": our_engine, "generate": plain_generate, "continuous": continuous_batching}[spec.system]
    with ending_at_random(model, spec) as end:
        warm_up = spec if spec.device == "cuda" else replace(spec, prompt=min(8, spec.prompt), completion=4)
        build(warm_up, model, tokenizer, [prompt[: warm_up.prompt] for prompt in prompts], end)()
        rollout = build(spec, model, tokenizer, prompts, end)
        channel.send(**asdict(ModelSize.of(model)))
        while True:
            channel.receive()
            start = time.perf_counter()
            lengths = rollout()
            seconds = time.perf_counter() - start
            if spec.mean_length and set(lengths) == {spec.completion}:
                raise RuntimeError("no completion ended: the logits do not come from the model's output head")
            if not spec.mean_length and set(lengths) != {spec.completion}:
                raise RuntimeError(f"completions of {sorted(set(lengths))} tokens, not {spec.completion}")
            channel.send(seconds=seconds, lengths=lengths, peak=peak_memory(spec.device))


@dataclass(frozen=True)
class Result:
    """Of one system on one shape: the answers to all requests, or why there are none."""

    answers: Sequence[Message]
    size: ModelSize | None = None
    error: str = ""

    def median(self, value: Callable[[Message], float]) -> float:
        return statistics.median(value(answer) for answer in self.answers)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.median(lambda answer: sum(answer["lengths"]) / answer["seconds"])


def measure(options: argparse.Namespace, spec: Spec) -> dict[str, Result]:
    """Rollouts of all systems in turns; a system that fails is left out from then on."""
    answers: dict[str, list[Message]] = {system: [] for system in options.systems}
    errors: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    try:
        for system in options.systems:
            try:
                workers[system] = Worker(MODULE, asdict(replace(spec, system=system)), options.threads)
            except WorkerError as error:
                errors[system] = str(error)
        for _ in range(options.repeats):
            for system, worker in workers.items():
                if system in errors:
                    continue
                try:
                    answers[system].append(worker.ask())
                except WorkerError as error:
                    errors[system] = str(error)
                    continue
                print(f"{system}: {answers[system][-1]['seconds']:.1f} s", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    return {
        system: Result(
            answers[system],
            ModelSize(**workers[system].ready) if system in workers else None,
            errors.get(system, ""),
        )
        for system in options.systems
    }


COLUMNS = (
    "shape",
    "system",
    "seconds",
    "mean length",
    "tokens/s",
    "ours is",
    "peak GB",
    "of memory floor",
    "of arithmetic floor",
)


def rows_of(machine: Machine, spec: Spec, results: dict[str, Result]) -> list[list[str]]:
    """A row for each system; for one that failed, the last line of its error."""
    shape = Shape(spec.prompt, spec.completion)
    label = f"{spec.prompt}→~{spec.mean_length} (≤{spec.completion})" if spec.mean_length else str(shape)
    rows = []
    for system, result in results.items():
        if result.error or result.size is None:
            lines = [line for line in result.error.splitlines() if line.strip()]
            rows.append([label, f"{system}: {lines[-1] if lines else 'failed'}", *[""] * (len(COLUMNS) - 2)])
            continue
        seconds = result.median(lambda answer: answer["seconds"])
        length = result.median(lambda answer: statistics.fmean(answer["lengths"]))
        ours = results.get("ours")
        ratio = f"{ours.rate / result.rate:.2f}×" if ours is not None and ours.answers else ""
        row = [label, system, f"{seconds:.2f}", f"{length:.0f}", f"{result.rate:.1f}", ratio]
        row.append(f"{max(answer['peak'] for answer in result.answers) / 1e9:.2f}")
        if spec.mean_length:  # how often the weights are read depends on the longest completion
            shares = ["", ""]
        else:
            arithmetic = machine.generation_arithmetic(result.size, shape, spec.prompts, spec.group_size)
            floors = machine.decoding_floor(result.size, shape), arithmetic
            shares = [f"{floor / seconds:.0%}" for floor in floors]
        rows.append([*row, *shares])
    return rows


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="our engine against generate and continuous batching")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder or Hub id, or a random-… name")
    parser.add_argument("--shapes", help="prompt and completion tokens: 300x32,100x100")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--mean-length", type=int, default=95, help="of ragged completions; 0 leaves them out")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="write the tables there, too")
    options = parser.parse_args()
    model, shapes, prompts = DEFAULTS[options.device]
    options.model = options.model or model
    options.shapes = parse_shapes(options.shapes or shapes)
    options.prompts = options.prompts or prompts
    options.systems = options.systems.split(",")
    return options


def main() -> None:
    options = parse_options()
    probe = MachineProbe(options.device, options.threads)
    specs = [
        Spec("", options.model, options.device, options.prompts, options.num_generations, *vars(shape).values())
        for shape in options.shapes
    ]
    if options.mean_length:
        specs.append(replace(specs[-1], completion=200, mean_length=options.mean_length))
    measured = []
    try:
        for spec in specs:
            measured.append((spec, measure(options, spec)))
            probe.measure()
        machine = probe.machine
    finally:
        probe.close()
    report = Report()
    rows = [row for spec, results in measured for row in rows_of(machine, spec, results)]
    title = f"{options.model}: {options.prompts} prompts × {options.num_generations} completions, medians"
    report.table(title, COLUMNS, rows)
    report.lines(machine.line())
    for spec, results in measured:
        for system, result in results.items():
            if result.error:
                report.lines(f"{spec.prompt}→{spec.completion} {system} failed: {result.error}")
    report.write(options.markdown)


if __name__ == "__main__":
    serve() if WORKER_FLAG in sys.argv else main()
