"""One process reads a model; all have it, to the bit, and no other ever holds more than its part of it."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies import fsdp, make_strategy
from grpo_cli.distributed.strategies.handing_on import _layout
from grpo_cli.errors import UserError
from grpo_cli.policy.load import load_policy
from grpo_cli.policy.model import base_model
from grpo_cli.policy.reference import reference_model
from grpo_cli.recipe.schema import ModelConfig, Recipe
from grpo_cli.train.optim import build_optimizer
from tests.conftest import byte_tokenizer, tiny_llama
from tests.processes import run_processes

STRATEGIES = ["ddp", "fsdp", "zero1", "zero2"]


def recipe_of(folder: Path, **model: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(folder), **model},
        "data": {"name": "d"},
        "rewards": ["r:r"],
        "loss": {"beta": 0.1},
        "train": {"output_dir": "o", "max_steps": 1},
    }


@pytest.fixture
def tied_model_dir(tmp_path: Path) -> Path:
    """A model whose head is its embedding, with generation settings of its own."""
    model = tiny_llama(tie_word_embeddings=True)
    model.generation_config = GenerationConfig(eos_token_id=[256, 7])
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


class Held:
    """The most bytes of tensors that were alive at once, looked at whenever some have been handed on."""

    EVERY = 9

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.most = self.calls = 0
        self._share_out = fsdp.distribute_tensor
        patch.setattr(fsdp, "distribute_tensor", self._shared_out)

    def _shared_out(self, tensor: torch.Tensor, *arguments: Any) -> Any:
        part = self._share_out(tensor, *arguments)
        self.calls += 1
        if self.calls % self.EVERY == 0:  # looking through all objects takes a while
            self.most = max(self.most, held_bytes())
        return part


def held_bytes() -> int:
    """Of all tensors with values."""
    found: dict[int, int] = {}
    for value in gc.get_objects():
        if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta:
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def load(strategy: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """What a rank has after loading: weights of policy and reference, what it read and held on the way."""
    ranks = Ranks.join(needs_group=True)
    settings = Recipe.model_validate(recipe)
    torch.manual_seed(ranks.rank)
    reads: list[str] = []
    read = AutoModelForCausalLM.from_pretrained

    def counted(name: str, **options: Any) -> Any:
        reads.append(name)
        return read(name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
        before = held_bytes()
        held = Held(patch)
        spread = make_strategy(strategy, settings, ranks)  # type: ignore[arg-type]
        model = load_policy(settings.model, loading=spread.loading)
        spread.take(model)
        frozen = reference_model(model, settings.model, spread.loading, spread.copied)
        optimizer = build_optimizer(model, settings.optim, spread.whole_shape)
        spread.prepare(model, optimizer)
        if frozen is not None:
            spread.prepare_frozen(frozen)
    seen = {
        "reads": len(reads),
        "held": held.most - before,
        "eos": base_model(model).generation_config.eos_token_id,
    }
    for name, one in (("policy", model), ("reference", frozen)):
        if one is not None:
            parts = [*one.named_parameters(), *one.named_buffers()]
            seen[name] = {key: spread.whole(value.detach()).clone() for key, value in parts}
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    seen["shards"] = sum(isinstance(parameter, DTensor) for parameter in optimized)
    return seen


def plain(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype, name
        assert torch.equal(weights[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_reads_and_all_have_the_same_bytes(tied_model_dir: Path, strategy: str) -> None:
    expected = plain(AutoModelForCausalLM.from_pretrained(tied_model_dir))
    ranks = run_processes(2, load, strategy, recipe_of(tied_model_dir))
    assert [seen["reads"] for seen in ranks] == [1, 0]
    for seen in ranks:
        assert_equal(seen["policy"], expected)
        assert_equal(seen["reference"], expected)
        assert seen["eos"] == [256, 7], "settings that are in no config.json"
        assert bool(seen["shards"]) == (strategy == "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_and_precisions_are_those_of_the_process_that_read(tied_model_dir: Path, strategy: str) -> None:
    recipe = recipe_of(tied_model_dir, lora={"r": 2, "modules_to_save": ["norm"]})
    one, other = run_processes(2, load, strategy, recipe)
    assert [one["reads"], other["reads"]] == [1, 0]
    assert_equal(other["policy"], one["policy"])
    adapters = [value for name, value in one["policy"].items() if "lora_A" in name]
    assert adapters
    assert all(value.abs().max() > 0 for value in adapters)


@pytest.mark.slow
def test_under_fsdp_a_process_holds_its_shards_and_one_tensor_on_the_way(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=8, vocab_size=300, hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    _, other = run_processes(2, load, "fsdp", recipe_of(tmp_path))
    # Half of the policy and half of its reference; a tensor that comes, and the parts that it is cut into.
    assert whole / 2 < other["held"] < whole + 4 * largest < 1.5 * whole


def restored(strategy: str, recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A rank's weights after a checkpoint that rank 0 alone has read, in which all of them are 1 larger."""
    ranks = Ranks.join(needs_group=True)
    settings = Recipe.model_validate(recipe)
    spread = make_strategy(strategy, settings, ranks)  # type: ignore[arg-type]
    model = load_policy(settings.model, loading=spread.loading)
    spread.take(model)
    optimizer = build_optimizer(model, settings.optim, spread.whole_shape)
    spread.prepare(model, optimizer)
    weights = None
    if ranks.is_main:
        read = AutoModelForCausalLM.from_pretrained(settings.model.name)
        weights = {name: value + 1 for name, value in read.state_dict().items()}
    spread.restore(weights, {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
    return {name: spread.whole(value.detach()).clone() for name, value in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_that_one_process_reads_is_restored_on_all(tied_model_dir: Path, strategy: str) -> None:
    start = AutoModelForCausalLM.from_pretrained(tied_model_dir)
    for weights in run_processes(2, restored, strategy, recipe_of(tied_model_dir)):
        assert_equal(weights, {name: value.detach() + 1 for name, value in start.named_parameters()})


def read_what_is_not_there(strategy: str, recipe: dict[str, Any]) -> str:
    from grpo_cli.train.assemble import _on_all_ranks

    ranks = Ranks.join(needs_group=True)
    settings = Recipe.model_validate(recipe)
    spread = make_strategy(strategy, settings, ranks)  # type: ignore[arg-type]
    try:
        _on_all_ranks(ranks, lambda: load_policy(settings.model, loading=spread.loading))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_weights_that_one_process_cannot_read_are_an_error_of_all(tied_model_dir: Path) -> None:
    (tied_model_dir / "model.safetensors").write_bytes(b"damaged")
    one, other = run_processes(2, read_what_is_not_there, "ddp", recipe_of(tied_model_dir))
    assert "cannot load" in one
    assert one == other


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "phi3", "olmo2", "qwen3_moe"]
)
def test_a_model_without_values_is_the_one_that_is_read_but_for_them(tmp_path: Path, kind: str) -> None:
    sizes = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 32,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    empty = load_policy(config, loading=lambda config: nullcontext(False))
    whole = load_policy(config)
    assert any(parameter.is_meta for parameter in empty.parameters())
    assert empty.config.to_dict() == whole.config.to_dict()
    assert _layout(empty) == _layout(whole)
    assert not any(tensor.is_meta for tensor in [*whole.parameters(), *whole.buffers()])
