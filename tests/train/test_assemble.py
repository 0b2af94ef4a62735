"""Everything that models and ranks must agree on before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import UserError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.schema import ModelConfig, Recipe
from grpo_cli.train.assemble import agree_on_sharing, assemble, notes
from grpo_cli.train.guards import autocast_for
from grpo_cli.train.objects import Objects
from tests.conftest import byte_tokenizer, tiny_llama


class TwoRanks(Ranks):
    """This rank and one that says something else."""

    def __init__(self, other: Sequence[str]) -> None:
        super().__init__()
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, list(self.other)]


def test_ranks_and_reference_share_prompts_together_or_not_at_all() -> None:
    policy, reference = PackedModel.checked(tiny_llama()), PackedModel.checked(tiny_llama())
    models = {"the policy": policy, "the reference": reference}
    agree_on_sharing(TwoRanks([]), models)
    assert policy.shares_prompts
    assert reference.shares_prompts
    agree_on_sharing(TwoRanks(["the policy: OutOfMemoryError: out of memory"]), models)
    for model in models.values():
        assert model.why_not_shared == "the policy: OutOfMemoryError: out of memory"
        assert model.config._attn_implementation == "sdpa"


def test_a_reference_that_cannot_share_prompts_keeps_the_policy_from_it(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    tiny_recipe["model"]["reference"] = str(tmp_path / "other")
    tiny_recipe["loss"] = {"beta": 0.1}
    rollouts, learner = assemble(Recipe.model_validate(tiny_recipe), Objects(), Ranks())
    assert not learner.policy.shares_prompts
    told = "the reference: ValueError: shared-prompt attention has no softcap"
    assert any(told in note for note in notes(rollouts, learner))


def test_the_note_says_what_keeps_prompts_from_being_shared(tiny_recipe: dict[str, Any]) -> None:
    def told() -> list[str]:
        parts = assemble(Recipe.model_validate(tiny_recipe), Objects(), Ranks())
        return [note for note in notes(*parts) if "shared" in note]

    assert told() == []
    tiny_recipe["model"]["attn_implementation"] = "eager"
    (note,) = told()
    assert note.startswith("prompts are not shared")
    assert "the policy: its attention kernel is eager; model.attn_implementation" in note


@pytest.mark.parametrize("is_emulated", [True, False])
def test_bfloat16_that_a_gpu_only_emulates_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, is_emulated: bool
) -> None:
    """T4 and V100: torch says that they support it, and means that it is emulated."""

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or not is_emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    device = torch.device("cuda")
    assert (autocast_for(ModelConfig(name="m"), device) is nullcontext) == is_emulated
    if is_emulated:
        with pytest.raises(UserError, match="this GPU has no bfloat16"):
            autocast_for(ModelConfig(name="m", compute_dtype="bfloat16"), device)
