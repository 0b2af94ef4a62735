"""Loads the policy, its tokenizer and the reference.

A model from the Hub, a folder, a GGUF file or a Python object comes out the same: a transformers causal language
model in the recipe's dtype, without dropout, with LoRA adapters if the recipe asks for them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo_cli import hub
from grpo_cli.errors import UserError, one_line
from grpo_cli.policy.files import locate_gguf, read_chat_template
from grpo_cli.policy.model import without_dropout
from grpo_cli.recipe import schema
from grpo_cli.recipe.schema import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Loading = Callable[[ModelConfig], AbstractContextManager[bool]]
"""Makes a context in which a model may be read in parts, or not by this process; see `Strategy.loading`."""


def read_whole(config: ModelConfig) -> AbstractContextManager[bool]:
    """Every process reads the whole model."""
    return nullcontext(True)


class EmptyModelForCausalLM:
    """Stands in for `AutoModelForCausalLM` where the values come from elsewhere: reads the configuration alone."""

    @staticmethod
    def from_pretrained(
        name: str,
        *,
        dtype: torch.dtype,
        attn_implementation: str | None,
        trust_remote_code: bool,
        **arguments: Any,
    ) -> Any:
        """The model that `AutoModelForCausalLM.from_pretrained` loads, on the meta device."""
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **arguments)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )


def load_policy(
    config: ModelConfig, *, model: Any = None, adapters: bool = True, loading: Loading = read_whole
) -> Any:
    """Load the model that is trained, on the CPU, or without values where `loading` says so.

    Args:
        config: the recipe's `model` section.
        model: an already loaded model to use instead of `config.name`; it is changed in place.
        adapters: attach the recipe's LoRA adapters.
        loading: context in which it is read.

    Raises:
        UserError: the model is not there, cannot be reached or cannot be read.
    """
    if model is None:
        model = load_pretrained(config, config.name, loading)
    without_dropout(model)
    if config.lora is not None and adapters:
        model = _with_adapters(model, config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()  # without it neither gradient checkpointing nor an adapter's dropout does anything
    return model


def _with_adapters(model: Any, config: schema.LoraConfig) -> PeftModel:
    """The model with new LoRA adapters; names that are not in the model are errors, not ignored."""
    names = [name for name, _ in model.named_modules()]
    for wanted in config.modules_to_save:
        if not any(name.endswith(wanted) for name in names):
            raise UserError(f"model.lora.modules_to_save: the model has no module {wanted}")
    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.r,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=config.target_modules,
                modules_to_save=config.modules_to_save or None,
            ),
        )
    except (ValueError, re.error) as error:
        linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
        choices = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise UserError(
            f"model.lora.target_modules: {str(error).split('. Please')[0]}; write all-linear, or names among "
            f"{choices or 'those of its modules'}"
        ) from error


def load_pretrained(config: ModelConfig, name: str, loading: Loading = read_whole) -> Any:
    """Load the causal language model `name` with the settings of `config`.

    Raises:
        UserError: as `load_policy`.
    """
    setting = "model.name" if name == config.name else "model.reference"
    folder, arguments = _source(config, name, setting)
    arguments["dtype"] = DTYPES[config.dtype]
    arguments["attn_implementation"] = None if config.attn_implementation == "auto" else config.attn_implementation
    with loading(config) as reads:
        kind = AutoModelForCausalLM if reads else EmptyModelForCausalLM
        hub.tell_download("model", folder, arguments.get("revision"), arguments.get("gguf_file"))
        model = _from_pretrained(kind, folder, setting, **arguments)
    return _dequantised(model) if reads and "gguf_file" in arguments else model


def load_tokenizer(config: ModelConfig, *, tokenizer: Any = None, is_offline: bool = False) -> Any:
    """Load the tokenizer, with the recipe's chat template; if `is_offline`, only if it is on this machine.

    Raises:
        UserError: it is not there, or has neither a padding nor an end-of-sequence token.
    """
    if tokenizer is None:
        name = config.tokenizer or config.name
        setting = "model.tokenizer" if config.tokenizer else "model.name"
        folder, arguments = _source(config, name, setting)
        arguments |= {"local_files_only": True} if is_offline else {}
        tokenizer = _from_pretrained(AutoTokenizer, folder, setting, **arguments)
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {config.name} has no end-of-sequence token, so completions would never end; "
            "set model.tokenizer to one that has it"
        )
    return tokenizer


def _source(config: ModelConfig, name: str, setting: str) -> tuple[str, dict[str, Any]]:
    """Folder or Hub id of `name`, and what to read it with; only `model.name` has a revision and a `gguf_file`."""
    is_policy = name == config.name
    folder, gguf_file = locate_gguf(name, config.gguf_file if is_policy else None, setting=setting)
    arguments = {
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision if is_policy else None,
    }
    return folder, arguments if gguf_file is None else arguments | {"gguf_file": gguf_file}


def _from_pretrained(auto_class: Any, name: str, setting: str, **arguments: Any) -> Any:
    what = "the tokenizer of " if auto_class is AutoTokenizer else ""
    shown = str(Path(name, arguments["gguf_file"])) if "gguf_file" in arguments else name
    try:
        return auto_class.from_pretrained(name, **arguments)
    except ImportError as error:
        if "attention" in str(error).lower():
            kernel = arguments["attn_implementation"]
            message = f"model.attn_implementation: {kernel} cannot be used here, write auto"
            raise UserError(f"{message}\n({error})") from error
        raise UserError(f"{setting}: loading {what}{shown} needs a package\n({error})") from error
    except Exception as error:  # a damaged file can end in any exception of transformers and its parsers
        message = f"{setting}: cannot load {what}{shown}"
        instead = f"set {setting} to a folder or .gguf file on this machine"
        words = hub.explained(error, "model", name, arguments.get("revision"), instead=instead)
        if words is not None and not Path(name).is_dir():
            raise UserError(f"{message}: {words}") from error
        reason = one_line(error)
        if "attn_implementation" in reason:
            message += "; it has no such attention kernel, set model.attn_implementation to auto"
        raise UserError(f"{message}\n({type(error).__name__}: {reason})") from error


def _dequantised(model: Any) -> Any:
    """The same weights in a model that does not know it came from a quantised file, so it can be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype, attention = model.dtype, config._attn_implementation
    plain = type(model)._from_config(config, dtype=dtype, attn_implementation=attention)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
