"""The workers of `episodes`: a scripted rollout, played by TRL's GRPOTrainer or by ours.

Both compute every token with the model and draw it; only then is it replaced by what the script says.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessor

from benchmarks._models import load
from benchmarks._scripts import CHAT_TEMPLATE, Plan, Played, Script, digest, distinct_tokens, script_of
from benchmarks._workers import Channel
from grpo_cli.data.prompts import Prompt
from grpo_cli.episode.driver import Driver
from grpo_cli.episode.environments import tools_of_callables
from grpo_cli.episode.template import EpisodeTemplate
from grpo_cli.episode.world import World
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.episode import EpisodeConfig
from grpo_cli.recipe.schema import GenerationConfig, ModelConfig
from grpo_cli.rollout.embedded.batch import Batch
from grpo_cli.rollout.embedded.engine import EmbeddedEngine, EmbeddedStream
from grpo_cli.rollout.engine import Demand, OnTurn, Turn, TurnStream
from grpo_cli.train.guards import autocast_for


@dataclass(frozen=True)
class Spec:
    """What a worker is to do."""

    system: str
    model: str
    device: str
    plan: dict[str, Any]
    """Of `Plan`."""


class Meter:
    """Counts what a model computes, and for how long."""

    def __init__(self, model: Any) -> None:
        self.tokens, self.passes, self.seconds, self._began = 0, 0, 0.0, 0.0
        self._hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        )

    def _before(self, model: Any, inputs: Any, arguments: dict[str, Any]) -> None:
        self.tokens += arguments["input_ids"].numel()
        self.passes += 1
        self._began = time.perf_counter()

    def _after(self, model: Any, inputs: Any, output: Any) -> None:
        self.seconds += time.perf_counter() - self._began

    def played(self, seconds: float, idle: float, script: Script, sequences: Sequence[Sequence[int]]) -> Played:
        """What was measured until now, of these episodes.

        Raises:
            RuntimeError: they are not those of the script.
        """
        for hook in self._hooks:
            hook.remove()
        for sequence, turns in zip(sequences, script.turns, strict=True):
            if list(sequence[-len(turns[-1]) :]) != turns[-1]:
                raise RuntimeError("an episode has not ended as its script does")
        distinct = distinct_tokens(sequences)
        return Played(seconds, idle, self.seconds, self.passes, self.tokens, distinct, digest(sequences))


class ScriptedBatch(Batch):
    """Says what the script says in place of what it has drawn."""

    def __init__(self, script: Script, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._script = script

    def _draw(self, logits: torch.Tensor, rows: slice, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = super()._draw(logits, rows, longest)
        said = [
            self._script.turns[row.turn.completion][row.turn.number][place]
            for row, place in zip(self.rows[rows], self.places[rows].tolist(), strict=True)
        ]
        return torch.tensor(said, device=tokens.device), logprobs


class WatchedStream:
    """A stream, and the seconds in which it had nothing to compute."""

    def __init__(self, stream: TurnStream) -> None:
        self._stream = stream
        self._since: float | None = None
        self.idle = 0.0

    def ask(self, turns: Sequence[Turn]) -> None:
        self._stream.ask(turns)

    def advance(self) -> bool:
        if self._since is not None:
            self.idle += time.perf_counter() - self._since
        computed = self._stream.advance()
        self._since = None if computed else time.perf_counter()
        return computed

    def forget(self, completion: int) -> None:
        self._stream.forget(completion)


class ScriptedEngine(EmbeddedEngine):
    """The embedded engine, with a policy that says what a script says."""

    script: Script
    watched: WatchedStream

    @contextmanager
    def stream(self, on_turn: OnTurn, demand: Demand) -> Iterator[Any]:
        with super().stream(on_turn, demand) as stream:
            assert isinstance(stream, EmbeddedStream)
            stream._batch = ScriptedBatch(self.script, self.sampling, self.ends, self.policy.device)
            self.watched = WatchedStream(stream)
            yield self.watched


def our_player(spec: Spec, model: Any, tokenizer: Any) -> Callable[[Plan, Script], Played]:
    """Plays a rollout with the driver and the embedded engine."""
    autocast = autocast_for(ModelConfig(name=spec.model), torch.device(spec.device))
    policy = PackedModel.checked(model)

    def play(plan: Plan, script: Script) -> Played:
        sampling = GenerationConfig(num_generations=plan.group_size, max_completion_tokens=script.limit)
        engine = ScriptedEngine(policy, tokenizer, sampling, autocast)
        engine.script = script
        tools = tools_of_callables([script.tool()])
        world = World(EpisodeConfig(max_turns=plan.turns), tools, {}, tokenizer, {}, engine.eos_token_ids)
        driver = Driver(engine, script.limit, world)
        template = EpisodeTemplate(tokenizer, {})
        chats = [[{"role": "user", "content": question}] for question in script.questions]
        prompts = [Prompt(row, chat, template.prompt_ids(chat, tools), {}) for row, chat in enumerate(chats)]
        keys = [(0, row) for row in range(plan.prompts)]
        meter = Meter(model)
        began = time.perf_counter()
        groups = driver.generate(prompts, keys, plan.group_size)
        seconds = time.perf_counter() - began
        sequences = [
            prompt.token_ids + completion.token_ids
            for prompt, group in zip(prompts, groups, strict=True)
            for completion in group
        ]
        driver.close()
        return meter.played(seconds, engine.watched.idle, script, sequences)

    return play


class SayTurns(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token to be drawn: the one that the script says next.

    Args:
        turns: tokens of each row's turn.
        width: tokens of each row before it.
    """

    def __init__(self, turns: Sequence[Sequence[int]], width: int) -> None:
        self._turns = turns
        self._width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self._width
        # A row that has ended is padded by `generate`, whatever is drawn.
        said = [turn[min(place, len(turn) - 1)] for turn in self._turns]
        scores = torch.full_like(scores, -torch.inf)
        return scores.scatter_(1, torch.tensor(said, device=scores.device)[:, None], 0.0)


def trl_player(spec: Spec, model: Any, tokenizer: Any) -> Callable[[Plan, Script], Played]:
    """Plays a rollout with GRPOTrainer."""
    from datasets import Dataset

    trl: Any = importlib.import_module("trl")  # the `bench` extra
    tokenizer.response_template = importlib.import_module("trl.chat_template_utils").qwen3_template
    generate = model.generate

    def play(plan: Plan, script: Script) -> Played:
        idle, numbers = 0.0, iter(range(plan.turns))
        look_up = script.tool()

        def timed(entry: int) -> str:
            nonlocal idle
            began = time.perf_counter()
            try:
                return look_up(entry)
            finally:
                idle += time.perf_counter() - began

        timed.__name__, timed.__doc__ = look_up.__name__, look_up.__doc__

        def say(input_ids: torch.Tensor, **arguments: Any) -> Any:
            number = next(numbers)
            turns = [episode[number] for episode in script.turns]
            processors = [SayTurns(turns, input_ids.shape[1])]
            return generate(input_ids=input_ids, logits_processor=processors, **arguments)

        model.generate = say
        rows = [{"prompt": [{"role": "user", "content": question}]} for question in script.questions]
        with tempfile.TemporaryDirectory() as folder:
            trainer = trl.GRPOTrainer(
                model,
                lambda completions, **_: [0.0] * len(completions),
                args=trl.GRPOConfig(**trl_arguments(spec, plan, script, folder)),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                tools=[timed],
            )
            trainer.model.train()
            kept: list[Any] = []
            original = trainer._generate

            def timing(prompts: Any) -> Any:
                meter = Meter(model)
                began = time.perf_counter()
                outputs = original(prompts)
                seconds = time.perf_counter() - began
                sequences = [list(before) + list(after) for before, after in zip(*outputs[:2], strict=True)]
                kept.append(meter.played(seconds, idle, script, sequences))
                return outputs

            trainer._generate = timing
            trainer._generate_and_score_completions([row for row in rows for _ in range(plan.group_size)])
        (played,) = kept
        assert isinstance(played, Played)
        return played

    return play


def trl_arguments(spec: Spec, plan: Plan, script: Script, folder: str) -> dict[str, Any]:
    """Of TRL's GRPOConfig: one micro-batch, of which no log-probabilities have to be computed beforehand."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": plan.episodes,
        "num_generations": plan.group_size,
        "max_completion_length": script.limit,
        "temperature": 1.0,
        "beta": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


PLAYERS = {"TRL": trl_player, "ours": our_player}


def serve() -> None:
    """Be the worker that the first message asks for; each further one names a seed."""
    channel = Channel()
    spec = Spec(**channel.receive())
    plan = Plan(**spec.plan)
    model, tokenizer = load(spec.model)
    tokenizer.chat_template = CHAT_TEMPLATE
    play = PLAYERS[spec.system](spec, model, tokenizer)
    warm_up = replace(plan, prompts=1, turns=min(2, plan.turns), longest_wait=0.0)
    play(warm_up, script_of(warm_up, tokenizer, seed=0))
    channel.send()
    while True:
        script = script_of(plan, tokenizer, channel.receive()["seed"])
        channel.send(**asdict(play(plan, script)))


if __name__ == "__main__":
    serve()
