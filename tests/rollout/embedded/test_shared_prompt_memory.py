"""Rows that share a prompt's keys and values get the logits of plain forward passes, whatever came and went."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe import limits
from grpo_cli.rollout.embedded import shared_prompt_memory
from grpo_cli.rollout.embedded.decode_graphs import DecodeGraphs
from grpo_cli.rollout.embedded.memory import filled_holes
from grpo_cli.rollout.embedded.shared_prompt_memory import SharedPromptMemory
from grpo_cli.rollout.engine import Demand

HEADS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**HEADS),
    "one key/value head": LlamaConfig(**(HEADS | {"num_key_value_heads": 1})),
    "qwen2": Qwen2Config(**HEADS),
    "mistral with a sliding window": MistralConfig(**HEADS, sliding_window=4),
    "gemma3": Gemma3TextConfig(
        **HEADS, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=3
    ),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
NEW_TOKENS = 9


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    assert PackedModel.checked(model.eval()).shares_prompts
    return model


class Rows:
    """The memory beside plain lists of what every row has read."""

    def __init__(self, model: Any, num_generations: int, graphs: DecodeGraphs | None = None) -> None:
        self.model = model
        demand = Demand(len(PROMPTS) * num_generations, len(PROMPTS), num_generations)
        self.memory = SharedPromptMemory(model, max(map(len, PROMPTS)), demand, NEW_TOKENS, graphs)
        self.group_size = num_generations
        self.sequences: list[list[int]] = []
        self.waiting: dict[int, list[int]] = {}
        self.generator = torch.Generator().manual_seed(0)

    def prefill(self, *prompts: list[int]) -> None:
        logits = self.memory.prefill(list(prompts), [self.group_size] * len(prompts))
        added = [list(prompt) for prompt in prompts for _ in range(self.group_size)]
        self.sequences += added
        self.check(logits, added)

    def room(self, waiting: list[list[int]]) -> int:
        return self.memory.room([(len(prompt), self.group_size) for prompt in waiting])

    def decode(self) -> None:
        tokens = torch.randint(97, (len(self.sequences),), generator=self.generator)
        logits = self.memory.decode(tokens)
        for sequence, token in zip(self.sequences, tokens.tolist(), strict=True):
            sequence.append(token)
        self.check(logits, self.sequences)

    def keep(self, *places: int, **parked: int) -> None:
        """Keep these rows; those in `parked` wait under their names, a digit each behind a letter."""
        names = {int(name[1:]): place for name, place in parked.items()}
        self.memory.keep(np.array(places, dtype=np.int64), names)
        self.waiting |= {name: self.sequences[place] for name, place in names.items()}
        self.sequences = [self.sequences[place] for place in places]

    def extend(self, new: dict[int, list[int]], forgotten: int = 0) -> None:
        """Have waiting rows read on, but for the last `forgotten` tokens that they had read."""
        held = [len(self.waiting[name]) - forgotten for name in new]
        logits = self.memory.extend(list(new), held, list(new.values()))
        added = [self.waiting.pop(name)[:count] + new[name] for name, count in zip(new, held, strict=True)]
        self.sequences += added
        self.check(logits, added)

    def check(self, logits: torch.Tensor, sequences: list[list[int]]) -> None:
        assert len(logits) == len(sequences)
        for row, sequence in zip(logits, sequences, strict=True):
            expected = self.model(torch.tensor([sequence]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_plain_forwards_as_rows_come_and_go(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CACHE_TOKENS", 2 * (7 + 3 * 8))  # two groups
    rows = Rows(build(name), 3)
    rows.prefill(PROMPTS[0], PROMPTS[1])
    assert rows.room(PROMPTS[2:]) == 0
    for _ in range(3):
        rows.decode()
    rows.keep(0, 5, 2, 3)
    rows.decode()
    rows.keep(3, 1)  # the first group is gone
    assert rows.room(PROMPTS[2:]) == 1
    rows.decode()
    rows.prefill(PROMPTS[2])
    for _ in range(3):
        rows.decode()
    rows.keep(4, 2)  # so is the second
    rows.prefill(PROMPTS[3])
    for _ in range(4):
        rows.decode()
    rows.keep()
    assert rows.room(PROMPTS) == 2


@torch.no_grad()
def test_long_prompts_are_computed_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompt_memory, "PREFILL_TOKENS", 8)
    rows = Rows(build("llama"), 2)
    passes: list[int] = []
    rows.model.model.register_forward_pre_hook(
        lambda *_: passes.append(_[2]["input_ids"].shape[1]), with_kwargs=True
    )
    rows.memory.prefill(PROMPTS, [2] * len(PROMPTS))
    assert passes == [4, 7, 2]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_what_prompts_begin_with_alike_is_computed_once(name: str) -> None:
    rows = Rows(build(name), 2)
    prompts = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8], [5, 6, 9, 10, 11], [5, 6, 7, 8]]
    with rows.model.register_forward_pre_hook(
        lambda *_: computed.append(_[2]["input_ids"].numel()), with_kwargs=True
    ):
        computed: list[int] = []
        rows.memory.prefill(prompts, [2] * len(prompts))
        assert computed == [9]
    rows = Rows(rows.model, 2)
    rows.prefill(*prompts)
    rows.decode()
    rows.keep(7, 1, 2)
    rows.decode()


@torch.no_grad()
def test_a_group_that_exceeds_the_memory_has_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CACHE_TOKENS", 1)
    rows = Rows(build("llama"), 2)
    assert rows.room(PROMPTS) == 1


@torch.no_grad()
def test_a_prompt_is_kept_once_for_its_group() -> None:
    rows = Rows(build("llama"), 5)
    rows.prefill(*PROMPTS)
    rows.decode()
    for layer in rows.memory.layers.values():
        assert [part.shape for part in layer.prompts] == [(4, 2, 7, 8)] * 2
        assert [part.shape for part in layer.rows] == [(20, 2, NEW_TOKENS - 1, 8)] * 2
    before = [part.data_ptr() for layer in rows.memory.layers.values() for part in layer.rows]
    for _ in range(NEW_TOKENS - 2):
        rows.decode()
    assert before == [part.data_ptr() for layer in rows.memory.layers.values() for part in layer.rows]


@pytest.mark.parametrize(
    ("alive", "expected"),
    [
        ([True, True], [0, 1]),
        ([False, True], [1]),
        ([True, False, True, False, True], [0, 4, 2]),
        ([False, False], []),
        ([False, True, False, True], [3, 1]),
    ],
)
def test_the_last_fill_the_holes(alive: list[bool], expected: list[int]) -> None:
    places = filled_holes(np.array(alive)).tolist()
    assert sorted(places) == sorted(expected)
    moved = sum(place != index for index, place in enumerate(places))
    assert moved == sum(place != index for index, place in enumerate(expected))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_rows_that_wait_read_on_from_what_they_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CACHE_TOKENS", 2 * (7 + 3 * 8))  # two groups
    rows = Rows(build(name), 3)
    rows.prefill(PROMPTS[0], PROMPTS[2])
    rows.decode()
    rows.keep(0, 5, 4, n7=1, n8=2)  # only one row of the first group goes on
    rows.decode()
    rows.keep(1, 2, n9=0)  # none does, and its prompt stays
    assert rows.room(PROMPTS) == 0
    rows.extend({8: [20, 21, 22], 7: [23]})
    rows.decode()
    rows.keep(3, 0, n1=1, n2=2)
    rows.extend({9: [24, 25]}, forgotten=1)  # its history was written anew from there
    rows.decode()
    rows.memory.drop(1)
    rows.keep(2)
    assert rows.room(PROMPTS) == 1  # nobody reads the second prompt any more
    rows.memory.drop(2)
    rows.memory.drop(3)  # never heard of
    rows.keep()
    assert rows.room(PROMPTS) == 2
    assert rows.memory.prompt_length(2) is None


@torch.no_grad()
def test_waiting_rows_make_way_for_rows_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CACHE_TOKENS", 2 * (7 + 2 * 8))  # two groups of two: four places
    rows = Rows(build("llama"), 2)
    rows.prefill(PROMPTS[0])
    rows.keep(n1=0, n2=1)
    rows.memory.drop(1)  # the last place is free again, the one before it is not
    rows.prefill(PROMPTS[1])
    rows.extend({2: [30, 31]})
    rows.decode()
    rows.keep(2, 0, n5=1)
    rows.decode()
    rows.extend({5: [32]})
    rows.decode()


@torch.no_grad()
def test_a_prompt_wider_than_announced_finds_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(build("mistral with a sliding window"), 2)
    rows.prefill(PROMPTS[0], PROMPTS[1])
    rows.decode()
    logits = rows.memory.prefill([list(range(40, 60))], [1])
    rows.sequences.append(list(range(40, 60)))
    rows.check(logits, rows.sequences[-1:])
    rows.decode()


def test_groups_of_any_size_fit_where_each_completion_may_begin_otherwise() -> None:
    """Environments say something else to each, or the same to all; either comes first."""
    model = build("llama")
    memory = SharedPromptMemory(model, 4, Demand(completions=12, groups=12, group_size=4), NEW_TOKENS)
    assert memory.room([(4, 1)] * 20) == 12
    with torch.no_grad():
        memory.prefill([[5, 6], [7, 8]], [1, 4])
        assert memory.room([(4, 4), (4, 4), (4, 1)]) == 1  # seven rows are left
        memory.prefill([[9], [10, 11]], [4, 3])
        assert memory.room([(4, 1)]) == 0
        assert len(memory.decode(torch.zeros(12, dtype=torch.long))) == 12
