"""Loads the policy, its tokenizer and the reference, and gives weights back in Hugging Face format.

A model from the Hub, a folder, a GGUF file or a Python object comes out the same: a transformers causal language
model in the recipe's dtype, without dropout, with LoRA adapters if the recipe asks for them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_cli.errors import UserError
from grpo_cli.policy.files import locate_gguf
from grpo_cli.recipe.schema import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(config: ModelConfig, *, model: Any = None, adapters: bool = True) -> Any:
    """Load the model that is trained, on the CPU.

    Args:
        config: the recipe's `model` section.
        model: an already loaded model to use instead of `config.name`; it is changed in place.
        adapters: attach the recipe's LoRA adapters.

    Raises:
        UserError: the model is not there, cannot be reached or cannot be read.
    """
    if model is None:
        model = load_pretrained(config, config.name)
    without_dropout(model)
    if config.lora is not None and adapters:
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora.r,
                lora_alpha=config.lora.alpha,
                lora_dropout=config.lora.dropout,
                target_modules=config.lora.target_modules,
                modules_to_save=config.lora.modules_to_save or None,
            ),
        )
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()  # without it neither gradient checkpointing nor an adapter's dropout does anything
    return model


def load_pretrained(config: ModelConfig, name: str) -> Any:
    """Load the causal language model `name` with the settings of `config`.

    Raises:
        UserError: as `load_policy`.
    """
    folder, gguf_file = locate_gguf(name, config.gguf_file if name == config.name else None)
    arguments: dict[str, Any] = {
        "dtype": DTYPES[config.dtype],
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision if name == config.name else None,
    }
    if gguf_file is not None:
        return dequantised(_from_pretrained(AutoModelForCausalLM, folder, gguf_file=gguf_file, **arguments))
    return _from_pretrained(AutoModelForCausalLM, folder, **arguments)


def load_tokenizer(config: ModelConfig, *, tokenizer: Any = None) -> Any:
    """Load the tokenizer, with the recipe's chat template.

    Raises:
        UserError: it is not there, or has neither a padding nor an end-of-sequence token.
    """
    if tokenizer is None:
        name = config.tokenizer or config.name
        folder, gguf_file = locate_gguf(name, config.gguf_file if name == config.name else None)
        arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if gguf_file is not None:
            arguments["gguf_file"] = gguf_file
        if name == config.name:
            arguments["revision"] = config.revision
        tokenizer = _from_pretrained(AutoTokenizer, folder, **arguments)
    if config.chat_template is not None:
        path = Path(config.chat_template).expanduser()
        is_template = "{" in config.chat_template
        if not is_template and not path.is_file():
            raise UserError(f"model.chat_template: there is no file {config.chat_template}")
        tokenizer.chat_template = config.chat_template if is_template else path.read_text(encoding="utf-8")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {config.name} has no end-of-sequence token, so completions would never end; "
            "set model.tokenizer to one that has it"
        )
    return tokenizer


def _from_pretrained(auto_class: Any, name: str, **arguments: Any) -> Any:
    try:
        return auto_class.from_pretrained(name, **arguments)
    except ImportError as error:
        raise UserError(f"loading {name}: {error}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        local = Path(name).is_dir()
        hint = "" if local else "; without a network, set model.name to a folder or .gguf file on this machine"
        if "attn_implementation" in reason:
            hint = "; it has no such attention kernel, set model.attn_implementation to eager"
        raise UserError(f"model.name: cannot load {name}{hint}\n({type(error).__name__}: {reason})") from error


def dequantised(model: Any) -> Any:
    """The same weights in a model that does not know it came from a quantised file, so it can be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype, attention = model.dtype, config._attn_implementation
    plain = type(model)._from_config(config, dtype=dtype, attn_implementation=attention)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def without_dropout(model: Any) -> None:
    """Switch dropout and routing noise off: with them, the policy that is trained is not the one that sampled."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


class Reference:
    """The model that the KL is measured against: another model, or the policy with its adapter off."""

    def __init__(self, policy: Any, config: ModelConfig) -> None:
        self._policy = policy
        self._model: Any = None
        if config.reference is not None:
            self._model = load_pretrained(config, config.reference)
        elif not isinstance(policy, PeftModel):
            self._model = copy.deepcopy(policy)
            self._model.activation_checkpointing_disable()
        if self._model is not None:
            self._model.requires_grad_(False).eval()

    def to(self, device: torch.device) -> Reference:
        if self._model is not None:
            self._model.to(device)
        return self

    @contextmanager
    def model(self) -> Iterator[Any]:
        """The reference model, for forward passes only."""
        if self._model is not None:
            yield self._model
            return
        with self._policy.disable_adapter():
            yield self._policy


def save_weights(model: Any, folder: Path) -> None:
    """Write what is trained: the whole model, or the adapter alone."""
    model.save_pretrained(folder)


def restore_weights(model: Any, folder: Path) -> None:
    """Load what `save_weights` wrote into `model`, bit for bit."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def save_standalone(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model that plain transformers and vLLM load as it is: adapters merged, trained weights untouched."""
    if isinstance(model, PeftModel):
        base, merged = model.get_base_model(), merged_state_dict(model)
        base.save_pretrained(folder, state_dict=merged)
        ties = getattr(base, "all_tied_weights_keys", {}).items()
        if not all(torch.equal(merged[name], merged[source]) for name, source in ties if name in merged):
            # An adapter on one of two tied weights parts them; vLLM goes by what the configuration says.
            config = copy.deepcopy(base.config)
            config.tie_word_embeddings = False
            config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def merged_state_dict(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base model's state dict with each adapter's product added to its weight."""
    merged: dict[str, torch.Tensor] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter)
                merged[f"{name}.weight"] = layer.weight + delta.to(layer.weight.dtype)
            if getattr(layer, "bias", None) is not None:
                merged[f"{name}.bias"] = layer.bias
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            merged |= {f"{name}.{key}": value for key, value in trained.state_dict().items()}
    adapter_parts = (".lora_", ".base_layer.", ".modules_to_save.", ".original_module.")
    for key, value in model.get_base_model().state_dict().items():
        if not any(part in key for part in adapter_parts):
            merged.setdefault(key, value)
    return merged
