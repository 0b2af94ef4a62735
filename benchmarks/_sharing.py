"""What the processes of `scaling_processes` do: our training loop, DistributedDataParallel, weight updates."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks._collectives import CollectiveCounter, Traffic
from benchmarks._models import DEFAULT_MODEL, load, random_prompts
from grpo_cli.algorithm.advantages import compute_advantages
from grpo_cli.data.prompts import Prompt
from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import zero
from grpo_cli.errors import UserError
from grpo_cli.recipe.strategies import STRATEGIES, StrategyName
from grpo_cli.rollout.engine import Completion, OnGroup, SampleKey
from grpo_cli.rollout.over_ranks import LedEngine
from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server.weight_transfer import fill_memory
from grpo_cli.serve import wire
from grpo_cli.serve.weights import memory_folder
from grpo_cli.train.assemble import assemble
from grpo_cli.train.display import Display
from grpo_cli.train.guards import deterministic_kernels
from grpo_cli.train.learner import Learner
from grpo_cli.train.loop import train_loop
from grpo_cli.train.objects import Objects, recipe_with_objects
from grpo_cli.train.recorder import Recorder
from grpo_cli.train.rollouts import TRAIN_STREAM
from grpo_cli.train.signals import StopRequest

with suppress(UserError):  # it is not installed: told where a strategy needs it
    zero._import_deepspeed()  # here, once for all that are forked

SEED = 42
LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0


TINY = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
"""A Llama of 5.6 million weights: most matrices have over 100,000, up to which DeepSpeed shares nothing out."""


@dataclass(frozen=True)
class Work:
    """A training step, the same for all."""

    folder: str
    """Of the model and its tokenizer."""
    texts: tuple[str, ...]
    """A prompt each."""
    completion: int
    """Tokens of each completion."""
    group_size: int
    token_budget: int
    """Tokens of a forward pass."""
    steps: int
    """That are measured, after one to warm up."""
    updates: int
    """Of a receiver's weights, after one to warm up."""
    count: bool
    """Make one more step, in which bytes are counted."""


@dataclass(frozen=True)
class Visit:
    """What one process saw."""

    train: list[float]
    """Seconds of the training phase of each measured step."""
    grad_norm: float
    """Of the first step."""
    packs: int
    """Forward and backward passes of a step."""
    parameters: int
    traffic: Traffic | None
    update: float = 0.0
    """Median seconds of a weight update, where it was asked for."""
    copy: float = 0.0
    """Median seconds of a plain copy of as many bytes."""
    update_bytes: int = 0


def make_model(folder: str, name: str, prompts: int, length: int) -> list[str]:
    """Write the model, tiny or smol, and its tokenizer into a folder; return prompts of `length` tokens."""
    model, tokenizer = load("random-tiny" if name == "tiny" else DEFAULT_MODEL)
    if name == "tiny":
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return random_prompts(tokenizer, prompts, length, seed=1)


def completion_tokens(key: Sequence[int], group_size: int, length: int) -> list[list[int]]:
    """The completions of a prompt: the same for every system."""
    return np.random.default_rng(list(key)).integers(10, 500, (group_size, length)).tolist()


def reward_of(token_ids: Sequence[int]) -> float:
    return float(sum(token_ids) % 101)


def sum_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A reward that differs within every group, so that no completion is without an advantage."""
    return [reward_of(token_ids) for token_ids in completion_ids]


class FixedRollouts:
    """An engine that takes no time, so that a step is its training phase."""

    def __init__(self, length: int) -> None:
        self._length = length

    def update_weights(self, version: int) -> int:
        return 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        keys: Sequence[SampleKey],
        num_generations: int,
        *,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        logprobs = [-1.0] * self._length
        groups = [
            [
                Completion(ids, logprobs, "stop", "")
                for ids in completion_tokens(key, num_generations, self._length)
            ]
            for key in keys
        ]
        for index, group in enumerate(groups):
            if on_group is not None:
                on_group(index, group)
        return groups

    def release_memory(self) -> None:
        return

    def close(self) -> None:
        return


class WatchedRecorder(Recorder):
    """Notes each step on every rank, and counts what the last one says to the others if asked to."""

    def watch(self, work: Work, learner: Learner) -> None:
        self._work = work
        self._counter = CollectiveCounter(learner.ranks.world_size)
        self._packs = 0
        self.seen: list[tuple[float, float, int]] = []
        """Seconds of training, gradient norm and packs of each step."""
        strategy: Any = learner.strategy
        backward = strategy.backward

        def counted(loss: torch.Tensor) -> None:
            self._packs += 1
            backward(loss)

        strategy.backward = counted

    def notify(self, event: str) -> None:
        super().notify(event)
        if event != "on_step_end":
            return
        metrics = self.state.metrics
        self.seen.append((metrics["time/train"], metrics["grad_norm"], self._packs))
        self._packs = 0
        if self._work.count and len(self.seen) == 1 + self._work.steps:
            self._counter.__enter__()
        elif self._work.count and len(self.seen) == 2 + self._work.steps:
            self._counter.__exit__(None, None, None)

    @property
    def traffic(self) -> Traffic | None:
        """From the end of the last measured step to the end of the one after it."""
        return self._counter.traffic if self._work.count else None


def ours(strategy: StrategyName, work: Work) -> Visit:
    """Our training loop, with completions that cost nothing, and updates of a receiver if asked for."""
    torch.set_num_threads(1)
    ranks = Ranks.join(needs_group=STRATEGIES[strategy].needs_group)
    with tempfile.TemporaryDirectory() as folder, deterministic_kernels():
        shared: str = ranks.tell(folder)
        objects = Objects(
            rewards=[sum_reward],
            train_data=[{"prompt": text} for text in work.texts],
            engine=FixedRollouts(work.completion),
        )
        recipe = recipe_with_objects(our_recipe(work, shared), objects, ())
        rollouts, learner = assemble(recipe, objects, ranks, strategy, note=lambda text: None)
        parameters = sum(learner.strategy.whole_shape(p).numel() for p in learner.model.parameters())
        with StopRequest() as stop, Display(Console(quiet=True), rollouts.max_steps, 1) as display:
            recorder = WatchedRecorder(recipe, rollouts, learner, (), stop, display)
            recorder.watch(work, learner)
            recorder.open(learner)
            recorder.start()
            train_loop(recipe, rollouts, learner, recorder)
            recorder.close()
        traffic = recorder.traffic
        update, copy, size = measure_updates(learner, work.updates) if work.updates else (0.0, 0.0, 0)
        ranks.gather(None)  # the folder stays until all are done
    measured = recorder.seen[1 : 1 + work.steps]
    return Visit(
        [seconds for seconds, _, _ in measured], recorder.seen[0][1], measured[0][2], parameters, traffic,
        update, copy, size,
    )  # fmt: skip


def our_recipe(work: Work, folder: str) -> dict[str, Any]:
    return {
        "model": {"name": work.folder},
        "data": {"shuffle": False},
        "generation": {"num_generations": work.group_size, "max_completion_tokens": work.completion},
        "optim": {"learning_rate": LEARNING_RATE, "scheduler": "constant", "max_grad_norm": MAX_GRAD_NORM},
        "train": {
            "output_dir": folder,
            "max_steps": 1 + work.steps + work.count,
            "prompts_per_step": len(work.texts),
            "max_tokens_per_microbatch": work.token_budget,
            "seed": SEED,
            "save_every": 0,
        },
        "logging": {"trackers": []},
    }


class Receiver(FixedRollouts):
    """Takes weights as a server on the same host does: into memory that both see, with a digest."""

    def __init__(self, path: str, policy: PolicyWeights) -> None:
        super().__init__(0)
        self._path = path
        self._policy = policy
        self._buckets = wire.plan_buckets(policy.specs("float32"))
        self.size = wire.total_bytes(self._buckets)

    def update_weights(self, version: int) -> int:
        fill_memory(self._path, self._buckets, self._policy)
        return self.size


def measure_updates(learner: Learner, updates: int) -> tuple[float, float, int]:
    """Median seconds of an update and of a plain copy, taking turns, and the bytes of either."""
    ranks = learner.ranks
    policy = PolicyWeights(learner.model, learner.strategy, ranks.device)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        receiver = Receiver(str(Path(folder, "weights")), policy)
        engine = LedEngine(receiver if ranks.is_main else None, ranks, policy)
        source = torch.ones(receiver.size if ranks.is_main else 0, dtype=torch.uint8)
        target = torch.zeros_like(source)
        copies, seconds = [], []
        for version in range(1 + updates):
            ranks.tell()
            start = time.perf_counter()
            target.copy_(source)
            copies.append(time.perf_counter() - start)
            ranks.tell()
            start = time.perf_counter()
            engine.update_weights(version)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), statistics.median(copies[1:]), receiver.size


def plain(work: Work) -> Visit:
    """torch's DistributedDataParallel around the transformers model: a row of prompt and completion for each."""
    torch.set_num_threads(1)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32)
    model.train()
    wrapped = model
    if count > 1:
        dist.init_process_group("gloo")
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    prompts = AutoTokenizer.from_pretrained(work.folder)(list(work.texts))["input_ids"]
    counter = CollectiveCounter(count)
    seconds, norms, packs = [], [], 0
    for step in range(1 + work.steps + work.count):
        parts, scale = plain_step(prompts, work, step, rank, count)
        packs = len(parts)
        if count > 1:
            dist.barrier()
        with counter if step > work.steps else nullcontext():
            start = time.perf_counter()
            optimizer.zero_grad()
            for index, (rows, advantages) in enumerate(parts):
                with wrapped.no_sync() if count > 1 and index < packs - 1 else nullcontext():
                    plain_loss(wrapped, rows, advantages, work.completion, scale).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
            optimizer.step()
            seconds.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    return Visit(seconds[1 : 1 + work.steps], norms[0], packs, parameters, counter.traffic if work.count else None)


def plain_step(
    prompts: list[list[int]], work: Work, step: int, rank: int, count: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], float]:
    """This rank's micro-batches, each (R, P + T) rows and (R,) advantages, and what losses are multiplied by."""
    completions = [
        ids
        for index in range(len(prompts))
        for ids in completion_tokens((SEED, TRAIN_STREAM, step, index), work.group_size, work.completion)
    ]
    rewards = torch.tensor([[reward_of(ids)] for ids in completions], dtype=torch.float64)
    advantages = compute_advantages(rewards, [1.0], work.group_size, "group", "sum_then_normalize")
    rows = torch.tensor([prompts[i // work.group_size] + ids for i, ids in enumerate(completions)])
    micro_batch = max(1, work.token_budget // rows.shape[1])
    own = zip(rows.tensor_split(count)[rank].split(micro_batch),
              advantages.tensor_split(count)[rank].split(micro_batch), strict=True)  # fmt: skip
    return list(own), count / (len(rows) * work.completion)  # DDP takes the mean over ranks


def plain_loss(
    model: Any, rows: torch.Tensor, advantages: torch.Tensor, length: int, scale: float
) -> torch.Tensor:
    """The clipped loss at a ratio of 1, from the model's own logits of the completions."""
    inputs = rows[:, :-1]
    output = model(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False, logits_to_keep=length
    )
    logprobs = -F.cross_entropy(output.logits.flatten(0, 1), rows[:, -length:].flatten(), reduction="none")
    ratio = (logprobs - logprobs.detach()).exp().view(len(rows), length)
    clipped = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -clipped.sum() * scale
