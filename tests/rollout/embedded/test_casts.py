"""Under autocast a rollout casts each weight once, whatever is trained, and leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import make_strategy
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.schema import GenerationConfig, Recipe
from grpo_cli.rollout.embedded.casts import weights_cast_once
from grpo_cli.rollout.embedded.engine import EmbeddedEngine
from tests.conftest import byte_tokenizer, tiny_llama
from tests.processes import run_processes
from tests.rollout.driving import Driven

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
KEYS = [(7, index) for index in range(len(PROMPTS))]
CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


def bfloat16() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def model_of(kind: str) -> Any:
    model = tiny_llama(tie_word_embeddings=kind == "tied", eos_token_id=[*range(0, 256, 16)])
    if kind != "lora":
        return model
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


class WeightCasts(TorchDispatchMode):
    """Counts casts of whole weights in each forward pass of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        self.passes: list[Counter[str]] = []
        model.register_forward_pre_hook(lambda *_: self.passes.append(Counter()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CASTS and args[0].data_ptr() in self.names:
            self.passes[-1][self.names[args[0].data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


def engine_of(model: Any, autocast: Any = bfloat16) -> Driven:
    policy = PackedModel.checked(model)
    config = GenerationConfig(max_completion_tokens=8)
    return Driven(EmbeddedEngine(policy, byte_tokenizer(), config, autocast))


@pytest.mark.parametrize("shares_prompts", [True, False])
@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_each_weight_is_cast_once_in_a_rollout(kind: str, shares_prompts: bool) -> None:
    model = model_of(kind)
    engine = engine_of(model)
    if not shares_prompts:
        engine.policy.take_plain_rows("asked for")
    for _ in range(2):
        with WeightCasts(model) as casts:
            engine.generate(PROMPTS, KEYS, 3)
        first, *decoding = casts.passes
        assert len(decoding) > 4
        assert sum(map(len, decoding)) == 0, "none in a decoding step"
        matrices = {name for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name}
        assert set(first) == matrices | ({"model.embed_tokens.weight"} if kind == "tied" else set())
        assert set(first.values()) == {1}


@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_what_is_cast_once_gives_what_autocast_gives(kind: str) -> None:
    model, tokens = model_of(kind).eval(), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = model(tokens).logits
    with weights_cast_once(model, bfloat16):
        for _ in range(2):
            assert torch.equal(model(tokens).logits, expected)
    with torch.inference_mode():
        plain = model(tokens).logits
    with weights_cast_once(model, nullcontext):
        assert torch.equal(model(tokens).logits, plain)


def test_only_what_was_trained_is_trained_afterwards_even_after_a_failure() -> None:
    model = model_of("lora")
    engine = engine_of(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    engine.generate(PROMPTS, KEYS, 2)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    model.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate(PROMPTS, KEYS, 2)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_weights_that_change_after_a_rollout_are_cast_anew() -> None:
    model = model_of("full")
    engine = engine_of(model)
    before = engine.generate(PROMPTS, KEYS, 2)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    after = engine.generate(PROMPTS, KEYS, 2)
    assert after != before
    assert after == engine_of(model).generate(PROMPTS, KEYS, 2)


def casts_of_ranks() -> dict[str, list[int]]:
    """Casts of weights in each forward pass of a rollout, by strategy, of a model that is shared out."""
    ranks = Ranks.join(needs_group=True)
    found = {}
    for strategy in ("fsdp", "zero3"):
        sections = {"model": {"name": "m"}, "data": {"name": "d"}, "rewards": ["r:r"]}
        recipe = Recipe.model_validate(sections | {"train": {"output_dir": "o", "max_steps": 1}})
        spread, model = make_strategy(strategy, recipe, ranks), model_of("lora")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        spread.prepare(model, torch.optim.AdamW(trained))
        policy = PackedModel.checked(model, spread.run, ranks.device)
        config = GenerationConfig(max_completion_tokens=8)
        engine = Driven(EmbeddedEngine(policy, byte_tokenizer(), config, bfloat16))
        with spread.whole_model(), WeightCasts(model) as casts:
            engine.generate(PROMPTS, KEYS, 3)
        assert sum(parameter.requires_grad for parameter in model.parameters()) == len(trained)
        found[strategy] = [sum(one.values()) for one in casts.passes]
    return found


@pytest.mark.slow
def test_a_model_that_was_shared_out_is_cast_once_too() -> None:
    for found in run_processes(2, casts_of_ranks):
        for first, *decoding in found.values():
            assert first > 0
            assert decoding
            assert not any(decoding)
