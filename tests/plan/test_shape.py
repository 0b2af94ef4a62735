from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.plan import shape
from grpo_cli.plan.shape import PUBLISHED, shape_of
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import LoraConfig
from tests.plan.models import RECIPE_72B, ROOT, SMALL, small_model, written


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("mistral", {"head_dim": 8}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_parameters_are_counted_from_the_configuration(kind: str, changes: dict[str, Any]) -> None:
    model = small_model(kind, **changes)
    found = shape_of(written(model.config))
    assert found is not None
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    (layer,) = {sum(p.numel() for p in layer.parameters()) for layer in model.model.layers}
    assert found.layer_parameters == layer


def test_published_shapes_have_the_published_number_of_parameters() -> None:
    counts = {name: found.parameters for name, found in PUBLISHED.items()}
    assert counts == {
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "Qwen/Qwen2-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
        "Qwen/Qwen2.5-72B": 72_706_203_648,
    }


def test_every_model_of_a_recipe_that_ships_has_a_plan_without_a_network() -> None:
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        name = load_recipe(path).model.name
        assert name in PUBLISHED or name.startswith("models/"), path


@pytest.mark.parametrize("config", [None, {}, {"model_type": "gpt2"}, {"model_type": "llama", "hidden_size": 8}])
def test_other_configurations_have_no_shape(config: dict[str, Any] | None) -> None:
    assert shape_of(config) is None


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"], ["lm_head_is_not_one", "v_proj"]])
@pytest.mark.parametrize("saved", [[], ["lm_head"]])
def test_adapters_are_counted(modules: str | list[str], saved: list[str]) -> None:
    import peft

    lora = LoraConfig(r=4, target_modules=modules, modules_to_save=saved)
    model = small_model("llama")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules, modules_to_save=saved or None)
    )
    found = shape_of(written(model.config))
    assert found is not None
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert found.adapter_parameters(lora) == trained


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_what_a_rollout_casts_is_counted_from_the_configuration(kind: str, changes: dict[str, Any]) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    model = small_model(kind, **changes)
    sizes = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    cast: dict[int, int] = {}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in sizes:
                cast[args[0].data_ptr()] = sizes[args[0].data_ptr()]
            return func(*args, **(kwargs or {}))

    with Casts(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.tensor([[1, 2]]))
    found = shape_of(written(model.config))
    assert found is not None
    assert found.matrix_parameters == sum(cast.values())


def test_the_configuration_in_the_hub_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = tmp_path / "models--me--mine"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_recipe(RECIPE_72B, ["model.name=me/mine"]).model
    found = shape.model_size(model, Path("me/mine"))
    assert found.source == "config.json in the Hub's cache"
    assert found.shape == shape_of(SMALL | {"model_type": "llama"})
