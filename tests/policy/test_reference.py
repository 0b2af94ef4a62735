"""The reference stands still, whatever the policy does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_cli.algorithm.packing import Group, Pack, pack_groups
from grpo_cli.policy.load import load_policy, read_whole
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.policy.reference import Reference, reference_model
from grpo_cli.recipe.schema import ModelConfig
from tests.conftest import tiny_llama
from tests.policy.test_export import train_a_little


def pack() -> Pack:
    (pack,) = pack_groups([Group([5, 6, 7], [[8, 200], [100, 3, 4]], [0, 1])], 100)
    return pack


def logprobs(model: PackedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.token_logprobs(pack(), 1.0)[0]


def reference_of(policy: PackedModel, config: ModelConfig) -> Reference:
    model = reference_model(policy.model, config, read_whole)
    return Reference(policy, None if model is None else PackedModel.checked(model))


@pytest.mark.parametrize("lora", [None, {"r": 4}, {"r": 4, "modules_to_save": ["lm_head"]}])
def test_the_reference_is_the_start_model_however_the_policy_moves(
    tiny_model_dir: Path, lora: dict[str, Any] | None
) -> None:
    config = ModelConfig.model_validate(
        {"name": str(tiny_model_dir), "lora": lora, "gradient_checkpointing": True}
    )
    policy = PackedModel.checked(load_policy(config))
    start = logprobs(PackedModel.checked(tiny_llama().eval()))
    reference = reference_of(policy, config)
    train_a_little(policy.model)
    with reference.model() as model:
        torch.testing.assert_close(logprobs(model), start)
        if lora is None:
            assert not any(parameter.requires_grad for parameter in model.model.parameters())
    moved = logprobs(policy)
    assert not torch.allclose(moved, start, atol=1e-2), "outside the context the policy is itself again"
    assert policy.model.training


def test_another_model_can_be_the_reference(tiny_model_dir: Path, tmp_path: Path) -> None:
    other = tiny_llama(num_hidden_layers=1)
    other.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tiny_model_dir), reference=str(tmp_path))
    with reference_of(PackedModel.checked(load_policy(config)), config).model() as model:
        torch.testing.assert_close(logprobs(model), logprobs(PackedModel.checked(other)))
