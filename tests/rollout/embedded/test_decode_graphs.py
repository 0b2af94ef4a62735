"""Recorded steps give what steps give, end with their rollout, and are given up where they cannot be had.

A tape stands in for a CUDA graph: it does again what a step did, with the same tensors, and asks nobody.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_cli.recipe import limits
from grpo_cli.rollout.embedded import batch, decode_graphs
from grpo_cli.rollout.embedded.decode_graphs import Compute, DecodeGraphs, bucketed
from grpo_cli.rollout.engine import Completion
from tests.rollout.embedded.tape import Tape
from tests.rollout.embedded.test_batch import KEYS, PROMPTS, RAGGED_EOS, engine_of, model_of
from tests.rollout.embedded.test_shared_prompt_memory import CONFIGS, NEW_TOKENS, Rows, build
from tests.rollout.embedded.test_shared_prompt_memory import PROMPTS as MEMORY_PROMPTS


def bfloat16() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


class Tapes:
    """Records on tapes, and knows which are alive."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []
        self.alive: weakref.WeakSet[Tape] = weakref.WeakSet()

    def __call__(self, compute: Compute, output: torch.Tensor) -> Tape:
        tape = Tape(compute, output)
        self.alive.add(tape)
        self.shapes.append(output.shape)
        return tape


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record a shape when it comes for the first time."""
    monkeypatch.setattr(decode_graphs, "EAGER_STEPS", 0)


# Recorded steps


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_replayed_logits_are_those_of_plain_forwards_as_rows_come_and_go(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CACHE_TOKENS", 3 * (7 + 5 * (NEW_TOKENS - 1)))  # three groups
    tapes = Tapes()
    rows = Rows(build(name), 5, DecodeGraphs(pytest.fail, tapes))
    rows.prefill(*MEMORY_PROMPTS[:2])
    for _ in range(3):
        rows.decode()
    rows.keep(0, 9, 2, 3, 8, 4)
    rows.decode()
    rows.prefill(MEMORY_PROMPTS[2])
    rows.decode()
    rows.keep(0, 2, 3, 6, 7, 8, 9, 10)
    for _ in range(2):
        rows.decode()
    rows.keep(5, 6)  # one group is left
    rows.prefill(*MEMORY_PROMPTS[3:])
    rows.decode()
    rows.keep(1)
    rows.decode()
    assert len(tapes.shapes) >= 3
    assert len(tapes.shapes) < 9, "some steps were replayed"


@pytest.mark.parametrize("autocast", [nullcontext, bfloat16])
@pytest.mark.parametrize("kind", ["llama", "lora", "sliding window"])
@pytest.mark.parametrize("look_every", [1, 4])
def test_a_rollout_from_recorded_steps_is_the_same_rollout(
    kind: str, autocast: Any, look_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind, RAGGED_EOS)
    monkeypatch.setattr(limits, "CACHE_TOKENS", 150)
    engine = engine_of(model, autocast, max_completion_tokens=30)
    if not engine.policy.shares_prompts:
        pytest.skip("not a model that can")
    expected = engine.generate(PROMPTS, KEYS, 4)
    monkeypatch.setitem(batch.LOOK_EVERY, "cpu", look_every)
    tapes = Tapes()
    engine.graphs = DecodeGraphs(pytest.fail, tapes)
    for _ in range(2):
        tapes.shapes.clear()
        actual = engine.generate(PROMPTS, KEYS, 4)
        assert tapes.shapes
        if autocast is nullcontext:
            assert tokens(actual) == tokens(expected)
        pairs = [pair for groups in zip(actual, expected, strict=True) for pair in zip(*groups, strict=True)]
        alike = [(one, other) for one, other in pairs if one.token_ids == other.token_ids]
        assert len(alike) > 0.7 * len(pairs), "rounding moves few tokens, and in float32 none"
        for one, other in alike:
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4 if autocast is nullcontext else 0.3)


def test_a_shape_is_recorded_once_it_has_come_often_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "EAGER_STEPS", 4)
    tapes, calls = Tapes(), []
    graphs = DecodeGraphs(pytest.fail, tapes)

    def compute() -> torch.Tensor:
        calls.append(1)
        return torch.ones(2, 3)

    outcomes = [graphs.run("shape", compute) for _ in range(7)]
    assert [outcome is None for outcome in outcomes] == [True] * 4 + [False] * 3
    assert len(calls) == 2, "once to compare with, once to record"
    assert graphs.run("another", compute) is None


def test_logits_of_all_shapes_are_in_one_place() -> None:
    graphs = DecodeGraphs(pytest.fail, Tapes())
    large, small = (graphs.run(rows, lambda rows=rows: torch.ones(rows, 3)) for rows in (8, 4))
    assert large is not None
    assert small is not None
    assert large.data_ptr() == small.data_ptr()
    assert large.shape == (8, 3)
    assert small.shape == (4, 3)


@given(st.integers(1, 100_000), st.sampled_from([4, 8, 64]), st.integers(1, 100_000))
def test_sizes_are_rounded_up_by_less_than_half(count: int, least: int, most: int) -> None:
    size = bucketed(count, least, most)
    assert size <= most
    if count <= most:
        assert count <= size < max(1.5 * count, least + 1)


# Given up


def refusing(compute: Compute, output: torch.Tensor) -> Tape:
    raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")


def mistaken(compute: Compute, output: torch.Tensor) -> Tape:
    return Tape(lambda: 1.1 * compute(), output)


def silent(compute: Compute, output: torch.Tensor) -> Tape:
    return Tape(compute, torch.empty_like(output))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (refusing, "could not be recorded (RuntimeError: CUDA error: operation not permitted when stream is"),
        (mistaken, "differs from itself by 0.1 of the largest logit"),
        (silent, "differs from itself by nan"),
    ],
)
def test_what_cannot_be_recorded_is_computed_as_it_comes_and_said_once(record: Any, reason: str) -> None:
    engine = engine_of(model_of("llama", RAGGED_EOS))
    expected = engine.generate(PROMPTS, KEYS, 4)
    notes: list[str] = []
    engine.graphs = DecodeGraphs(notes.append, record)
    for _ in range(2):
        assert engine.generate(PROMPTS, KEYS, 4) == expected
    (note,) = notes
    assert note.startswith("generation goes on without CUDA graphs: ")
    assert reason in note


def test_a_step_that_waits_for_the_device_is_not_recorded() -> None:
    notes: list[str] = []
    model = model_of("llama", RAGGED_EOS)
    engine = engine_of(model)
    expected = engine.generate(PROMPTS, KEYS, 4)
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, output: output * inputs[0].ge(0).all().item())
    engine.graphs = DecodeGraphs(notes.append, Tapes())
    assert engine.generate(PROMPTS, KEYS, 4) == expected
    assert "not permitted when stream is capturing" in notes[0]


def test_logits_that_are_minus_infinity_in_both_are_the_same() -> None:
    logits = torch.tensor([[1.0, -torch.inf]])
    assert DecodeGraphs(pytest.fail, Tapes()).run("shape", lambda: logits * 1) is not None


# Let go of


def test_what_was_recorded_is_let_go_of_with_the_rollout_even_after_a_failure() -> None:
    model = model_of("llama", RAGGED_EOS)
    engine = engine_of(model)
    tapes = Tapes()
    engine.graphs = DecodeGraphs(pytest.fail, tapes)
    alive: list[int] = []

    def on_group(index: int, group: list[Completion]) -> None:
        alive.append(len(tapes.alive))

    engine.generate(PROMPTS, KEYS, 4, on_group=on_group)
    assert max(alive) > 0
    gc.collect()
    assert not tapes.alive

    def fail(index: int, group: list[Completion]) -> None:
        on_group(index, group)
        raise RuntimeError("a reward failed")

    alive.clear()
    with pytest.raises(RuntimeError, match="a reward failed"):
        engine.generate(PROMPTS, KEYS, 4, on_group=fail)
    assert alive[0] > 0
    gc.collect()
    assert not tapes.alive


# A GPU


def test_only_a_gpu_records(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", RAGGED_EOS)
    engine = engine_of(model)
    assert engine.graphs is None
    engine.policy.device = torch.device("cuda", 0)
    notes: list[str] = []
    graphs = type(engine.engine)(
        engine.policy, engine.tokenizer, engine.sampling, nullcontext, notes.append
    ).graphs
    assert graphs is not None
    logits = torch.ones(1, 2)
    assert graphs.run("shape", lambda: logits) is None, "there is none here"
    assert "generation goes on without CUDA graphs: a step could not be recorded" in notes[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_a_gpu_replays_what_it_computes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind, RAGGED_EOS).cuda()
    engine = engine_of(model, lambda: torch.autocast("cuda", dtype=torch.bfloat16), max_completion_tokens=40)
    recorded: list[Any] = []
    engine.graphs = DecodeGraphs(pytest.fail, None)
    cuda_graph = engine.graphs._cuda_graph

    def record(compute: Compute, output: torch.Tensor) -> Any:
        recorded.append(output.shape)
        return cuda_graph(compute, output)

    monkeypatch.setattr(engine.graphs, "_cuda_graph", record)
    replayed = engine.generate(PROMPTS, KEYS, 8)
    assert recorded
    engine.graphs = None
    plain = engine.generate(PROMPTS, KEYS, 8)
    alike = [one.token_ids == other.token_ids for a, b in zip(replayed, plain, strict=True)
             for one, other in zip(a, b, strict=True)]  # fmt: skip
    assert sum(alike) > 0.7 * len(alike), "rounding moves few tokens"
