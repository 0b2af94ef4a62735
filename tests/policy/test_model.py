"""Nothing in a model in training is left to chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BioGptConfig, BloomConfig, GPT2Config, MixtralConfig, OPTConfig

from grpo_cli.policy.model import without_dropout
from tests.policy.test_export import IDS

DROPOUT: dict[str, Any] = {
    "gpt2": GPT2Config(
        vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.1, resid_pdrop=0.1
    ),
    "opt": OPTConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=48,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.1,
        attention_dropout=0.1,
        layerdrop=0.5,
    ),
    "bloom": BloomConfig(
        vocab_size=260, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1, attention_dropout=0.1
    ),
    "biogpt": BioGptConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
    "mixtral": MixtralConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=2,
        attention_dropout=0.1,
        router_jitter_noise=0.5,
    ),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_two_forwards_of_the_model_in_training_agree(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DROPOUT[name]).train()
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, model(IDS).logits), "the model has dropout to switch off"
        without_dropout(model)
        assert torch.equal(model(IDS).logits, model(IDS).logits)
