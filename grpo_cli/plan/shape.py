"""How large a model is and of what shape, from its config.json alone. No torch, and no weights are downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_cli import hub
from grpo_cli.policy.files import count_parameters
from grpo_cli.recipe.schema import LoraConfig, ModelConfig

HUB_TIMEOUT_S = 5.0
"""Longest wait for the Hub's answer."""

QKV = frozenset({"q_proj", "k_proj", "v_proj"})

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Kinds of config.json whose decoder is made of RMS norms, attention and a gated MLP."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder with RMS norms, grouped-query attention and a gated MLP: Llama, Mistral, Qwen2, Qwen3."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""
    biased: frozenset[str] = frozenset()
    """Projections with a bias."""
    norms_heads: bool = False
    """Whether queries and keys are normalised (Qwen3)."""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear map of a layer."""
        return {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.query_width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        matrices = sum(rows * columns for rows, columns in self.projections.values())
        biases = sum(self.projections[name][1] for name in self.biased)
        return matrices + biases + 2 * self.hidden + 2 * self.head_dim * self.norms_heads

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; the output head has as many."""
        return self.vocabulary * self.hidden

    @property
    def end_parameters(self) -> int:
        """Parameters of embedding and output head, which may be one."""
        return (2 - self.tied) * self.embedding_parameters

    @property
    def matrix_parameters(self) -> int:
        """Parameters of linear maps, the output head among them: those that autocast casts.

        It leaves norms as they are, and an embedding that is not the output head too.
        """
        norms = 2 * self.hidden + 2 * self.head_dim * self.norms_heads
        return self.layers * (self.layer_parameters - norms) + self.embedding_parameters

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.end_parameters + self.hidden

    def adapter_parameters(self, lora: LoraConfig) -> int:
        """Trained parameters under LoRA. A regular expression counts as `all-linear`."""
        names = list(self.projections) if isinstance(lora.target_modules, str) else lora.target_modules
        adapted = [self.projections[name] for name in names if name in self.projections]
        whole = [name for name in lora.modules_to_save if name in ("embed_tokens", "lm_head")]
        matrices = self.layers * sum(lora.r * (rows + columns) for rows, columns in adapted)
        return matrices + len(whole) * self.embedding_parameters


PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelShape(576, 30, 1536, 9, 3, 64, 49152, True),
    **dict.fromkeys(
        ("Qwen/Qwen2-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ModelShape(896, 24, 4864, 14, 2, 64, 151936, True, QKV),
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": ModelShape(1536, 28, 8960, 12, 2, 128, 151936, True, QKV),
    "Qwen/Qwen2.5-72B": ModelShape(8192, 80, 29568, 64, 8, 128, 152064, False, QKV),
}
"""The models of the recipes that ship, as their publishers describe them, so that their plans need no network."""


@dataclass(frozen=True)
class ModelSize:
    """What is known of a model before it is loaded."""

    parameters: int | None
    shape: ModelShape | None
    source: str
    """Where that is from, or why it is not known."""


def model_size(model: ModelConfig, folder: Path) -> ModelSize:
    """Look into the folder, the Hub's cache on this machine, the shapes known here, and at last on the Hub.

    Args:
        model: the recipe's `model` section.
        folder: its folder, or its Hub id.

    Raises:
        UserError: a safetensors file is damaged.
    """
    if folder.is_dir():
        counted = count_parameters(folder)  # first of all, since damaged files are found on the way
        shape = shape_of(_read(folder / "config.json") if model.gguf_file is None else None)
        if shape is not None:
            return ModelSize(shape.parameters, shape, "config.json")
        if counted is not None:
            return ModelSize(counted, None, "the safetensors files; its config.json is of a kind not known here")
        why = "known once the model is loaded: it has neither a config.json of a known kind nor safetensors files"
        return ModelSize(None, None, why)
    shape = shape_of(_cached_config(model))
    if shape is not None:
        return ModelSize(shape.parameters, shape, "config.json in the Hub's cache")
    if model.name in PUBLISHED:
        shape = PUBLISHED[model.name]
        return ModelSize(shape.parameters, shape, "the shape as published")
    config, reason = _config_from_hub(model)
    shape = shape_of(config)
    if shape is not None:
        return ModelSize(shape.parameters, shape, "config.json on the Hub")
    reason = reason or "its config.json is of a kind not known here"
    return ModelSize(None, None, f"known once the model is loaded: {reason}")


def shape_of(config: Mapping[str, Any] | None) -> ModelShape | None:
    """The shape that a config.json describes; None if it is of another kind of model.

    What it leaves out has the default of transformers' configuration class.
    """
    if config is None or config.get("model_type") not in DECODERS:
        return None
    kind = config["model_type"]
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        biased: frozenset[str] = QKV if kind == "qwen2" else frozenset()
        if kind in ("llama", "qwen3") and config.get("attention_bias"):
            biased |= QKV | {"o_proj"}
        if kind == "llama" and config.get("mlp_bias"):
            biased |= {"gate_proj", "up_proj", "down_proj"}
        return ModelShape(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            biased=biased,
            norms_heads=kind == "qwen3",
        )
    except (KeyError, TypeError, ValueError):
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _cached_config(model: ModelConfig) -> dict[str, Any] | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return _read(Path(path)) if isinstance(path, str) else None


def _config_from_hub(model: ModelConfig) -> tuple[dict[str, Any] | None, str]:
    """The config.json on the Hub, asked for once; or why it could not be had."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    try:
        url = hf_hub_url(model.name, "config.json", revision=model.revision)
        response = get_session().get(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT_S, follow_redirects=True)
        if response.status_code != 200:
            return None, _refusal(response, model)
        config = response.json()
    except Exception as error:  # the HTTP client's, huggingface_hub's and the parser's have no common base
        return None, f"its config.json is not on this machine, and the Hub is not reached ({type(error).__name__})"
    return (config, "") if isinstance(config, dict) else (None, "")


def _refusal(response: Any, model: ModelConfig) -> str:
    """Why the Hub has not sent the config.json, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    words = None
    try:
        hf_raise_for_status(response)
    except HfHubHTTPError as error:
        words = hub.explained(error, "model", model.name, model.revision, instead="set model.name to a folder")
    return words or f"the Hub answers {response.status_code} to a request for its config.json"
