"""A run of the product in this process, random weights and forced lengths, for the parts of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks._models import RANDOM_MODELS, random_model, random_prompts, word_tokenizer
from benchmarks._trainers import noisy_length


def make_run(
    model_name: str,
    device: str,
    sections: Mapping[str, Any],
    *,
    prompts: int,
    prompt: int,
    callbacks: Sequence[Any] = (),
    note: Callable[[str], None] = print,
) -> tuple[Any, Any]:
    """The run that `grpo train` builds of a recipe with these sections, and the objects that it was built of.

    Its prompts are so many of so many random tokens, its completions never end by themselves; `note` is told what
    the user would be.
    """
    import torch

    from grpo_cli.distributed.ranks import Ranks
    from grpo_cli.train.api import recipe_with_objects
    from grpo_cli.train.run import Objects, build_run

    dtype = getattr(torch, sections.get("model", {}).get("dtype", "float32"))
    model = random_model(model_name, device, dtype)
    tokenizer = word_tokenizer(RANDOM_MODELS[model_name]["vocab_size"])
    data = [{"prompt": text} for text in random_prompts(tokenizer, prompts, prompt, seed=1)]
    objects = Objects(model, tokenizer, [noisy_length], data, None, list(callbacks))
    run = build_run(recipe_with_objects(sections, objects, ()), objects, Ranks(), note=note)
    engine: Any = run.engine
    engine.eos_token_ids = {RANDOM_MODELS[model_name]["vocab_size"]}  # no token has this number
    return run, objects


def train(run: Any, objects: Any) -> None:
    """The training loop, without a word."""
    from rich.console import Console

    from grpo_cli.train.display import Display
    from grpo_cli.train.loop import train_loop
    from grpo_cli.train.session import Session
    from grpo_cli.train.signals import StopRequest

    with StopRequest() as stop_request, Display(Console(quiet=True), run.max_steps, 1) as display:
        session = Session(run, objects, stop_request, display)
        session.start()
        train_loop(run, session)


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
