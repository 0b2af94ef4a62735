"""A run of the product in this process, random weights and forced lengths, for the parts of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks._models import RANDOM_MODELS, random_model, random_prompts, word_tokenizer
from benchmarks._trainers import noisy_length


@dataclass
class Run:
    """What `grpo train` puts together."""

    rollouts: Any
    learner: Any
    callbacks: Sequence[Any]


def make_run(
    model_name: str,
    device: str,
    sections: Mapping[str, Any],
    *,
    prompts: int,
    prompt: int,
    callbacks: Sequence[Any] = (),
    note: Callable[[str], None] = print,
) -> Run:
    """The run that `grpo train` builds of a recipe with these sections.

    Its prompts are so many of so many random tokens, its completions never end by themselves; `note` is told what
    the user would be.
    """
    import torch

    from grpo_cli.distributed.ranks import Ranks
    from grpo_cli.train.assemble import assemble
    from grpo_cli.train.objects import Objects, recipe_with_objects

    dtype = getattr(torch, sections.get("model", {}).get("dtype", "float32"))
    model = random_model(model_name, device, dtype)
    tokenizer = word_tokenizer(RANDOM_MODELS[model_name]["vocab_size"])
    data = [{"prompt": text} for text in random_prompts(tokenizer, prompts, prompt, seed=1)]
    objects = Objects(model, tokenizer, [noisy_length], data)
    rollouts, learner = assemble(recipe_with_objects(sections, objects, ()), objects, Ranks(), note=note)
    engine: Any = rollouts.engine
    engine.eos_token_ids = {RANDOM_MODELS[model_name]["vocab_size"]}  # no token has this number
    return Run(rollouts, learner, callbacks)


def train(run: Run) -> None:
    """The training loop, without a word."""
    from rich.console import Console

    from grpo_cli.train.display import Display
    from grpo_cli.train.loop import train_loop
    from grpo_cli.train.recorder import Recorder
    from grpo_cli.train.signals import StopRequest

    rollouts, learner = run.rollouts, run.learner
    with StopRequest() as stop_request, Display(Console(quiet=True), rollouts.max_steps, 1) as display:
        recorder = Recorder(rollouts.recipe, rollouts, learner, run.callbacks, stop_request, display)
        recorder.open(learner)
        recorder.start()
        train_loop(rollouts.recipe, rollouts, learner, recorder)


def wait_for(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class Peaks:
    """The most memory in bytes that tensors took, and torch's allocator with them, in each phase.

    On a CPU there is no such count: all figures are 1.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}

    def begin(self) -> None:
        """Forget what was, also what the allocator holds without need."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def end(self, phase: str) -> None:
        """What was the most since `begin`, if it is more than the phase had before."""
        allocated, reserved = 1, 1
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        self.allocated[phase] = max(allocated, self.allocated.get(phase, 0))
        self.reserved[phase] = max(reserved, self.reserved.get(phase, 0))

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        self.begin()
        yield
        self.end(phase)
