"""A set of weights that lacks any one tensor is refused by name, whatever kinds of layers a model has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from grpo_cli.rollout.policy_weights import PolicyWeights
from grpo_cli.rollout.server.connection import ServerAway, WrongWeights
from grpo_cli.rollout.with_vllm import save_for_vllm
from grpo_cli.serve.protocol import Weights
from tests.conftest import byte_tokenizer
from tests.integration.serving import Serve, drift, generate, send_set

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SHAPE = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    "eos_token_id": 256, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases of attention, tied": ("qwen2", {"tie_word_embeddings": True}),
    "biases of attention and norms": ("stablelm", {"use_qkv_bias": True}),
    "biases everywhere, fused attention": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}),
}
"""What a model has that others lack, to its type and settings."""


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def policy(request: pytest.FixtureRequest) -> Any:
    """A model with other weights than a fresh one, whose biases are zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = request.param
    shape = {"vocab_size": 260, "eos_token_id": 256, "bos_token_id": None} if kind == "gpt2" else SHAPE
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def server(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    folder = tmp_path_factory.mktemp("model")
    save_for_vllm(policy, byte_tokenizer(), folder)
    server = Serve(folder, "--load-format", "dummy")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def test_a_set_without_any_one_tensor_is_refused_by_name_and_a_whole_one_heals(server: Serve, policy: Any) -> None:
    client, weights = server.client(), PolicyWeights(policy)
    names = [spec.name for spec in weights.specs("float32")]
    assert sum(name.endswith("bias") for name in names) >= 6
    with pytest.raises(ServerAway, match="the set of weights is not whole: nothing or too little for "):
        send_set(client, Weights(run="first", version=0), weights, leave_out=names[-1])
    for index, missing in enumerate(["", *names]):
        version = Weights(run="whole", version=index)
        if missing:
            with pytest.raises(ServerAway, match=re.escape(f"the last whole set had {missing} as well")):
                send_set(client, version, weights, leave_out=missing)
            with pytest.raises(WrongWeights, match=re.escape(missing)):
                generate(client, None)
        client.send_weights(version, weights)
        assert drift(generate(client, version, n=1, max_completion_tokens=4), policy) < 1e-3, missing
