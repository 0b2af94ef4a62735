"""Loads the policy, its tokenizer and the reference, and gives weights back in Hugging Face format.

A model from the Hub, a folder, a GGUF file or a Python object comes out the same: a transformers causal language
model in the recipe's dtype, without dropout, with LoRA adapters if the recipe asks for them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo_cli.errors import UserError
from grpo_cli.policy.files import locate_gguf, read_chat_template
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
    folder, gguf_file = locate_gguf(name, config.gguf_file if name == config.name else None, setting=setting)
    arguments: dict[str, Any] = {
        "dtype": DTYPES[config.dtype],
        "attn_implementation": None if config.attn_implementation == "auto" else config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision if name == config.name else None,
    }
    if gguf_file is not None:
        arguments["gguf_file"] = gguf_file
    with loading(config) as reads:
        kind = AutoModelForCausalLM if reads else EmptyModelForCausalLM
        model = _from_pretrained(kind, folder, setting, **arguments)
    return dequantised(model) if reads and gguf_file is not None else model


def load_tokenizer(config: ModelConfig, *, tokenizer: Any = None) -> Any:
    """Load the tokenizer, with the recipe's chat template.

    Raises:
        UserError: it is not there, or has neither a padding nor an end-of-sequence token.
    """
    if tokenizer is None:
        name = config.tokenizer or config.name
        setting = "model.tokenizer" if config.tokenizer else "model.name"
        folder, gguf_file = locate_gguf(name, config.gguf_file if name == config.name else None, setting=setting)
        arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if gguf_file is not None:
            arguments["gguf_file"] = gguf_file
        if name == config.name:
            arguments["revision"] = config.revision
        tokenizer = _from_pretrained(AutoTokenizer, folder, setting, **arguments)
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {config.name} has no end-of-sequence token, so completions would never end; "
            "set model.tokenizer to one that has it"
        )
    return tokenizer


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
        reason = " ".join(str(error).split())[:500]
        local = Path(name).is_dir()
        hint = "" if local else f"; without a network, set {setting} to a folder or .gguf file on this machine"
        if "attn_implementation" in reason:
            hint = "; it has no such attention kernel, set model.attn_implementation to auto"
        message = f"{setting}: cannot load {what}{shown}{hint}"
        raise UserError(f"{message}\n({type(error).__name__}: {reason})") from error


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


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without an adapter's dropout, for as long as it is entered."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def base_model(model: Any) -> Any:
    """The transformers model itself, inside its adapters if it has any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def save_weights(model: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write what is trained: the whole model, or the adapter alone; from `state` where the model is not whole."""
    if isinstance(model, PeftModel):
        # By default PEFT asks the Hub, at every save, whether the embeddings have grown.
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
    else:
        model.save_pretrained(folder, state_dict=state)


def saved_weights(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What `save_weights` wrote, under the names that the parameters of `model` have.

    Raises:
        ValueError: a weight that is trained is not among them.
    """
    if isinstance(model, PeftModel):
        saved = load_peft_weights(str(folder), device="cpu")
        own = model.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in own.items()}
        as_saved = get_peft_model_state_dict(model, own, save_embedding_layers=False)
        weights = {names[id(tensor)]: saved[key] for key, tensor in as_saved.items() if key in saved}
    else:
        weights = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and n not in weights]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}")
    return weights


def save_standalone(
    model: Any, tokenizer: Any, folder: Path, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a model that plain transformers and vLLM load as it is: adapters merged, trained weights untouched.

    Args:
        model: the policy.
        tokenizer: written beside it.
        folder: that is there.
        state: of the model without adapters, where it is not whole here.
    """
    if isinstance(model, PeftModel) or state is not None:
        base, merged = base_model(model), dict(state or merged_state_dict(model))
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


def merged_state_dict(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base model's state dict with each adapter's product added to its weight."""
    getters = standalone_tensors(model).items()
    # What is merged goes to the CPU at once: there need not be room for a second model on the device.
    return {name: get().cpu() if isinstance(get, partial) else get() for name, get in getters}


def standalone_tensors(model: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """For each name of the state dict of a model without adapters, a function that gives the tensor as it is now.

    A weight with an adapter is merged when it is asked for, so that one of them at a time takes memory.
    """
    base = base_model(model)
    tensors: dict[str, Callable[[], torch.Tensor]] = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            tensors[f"{name}.weight"] = partial(_merged_weight, module)
            bias = getattr(module.get_base_layer(), "bias", None)
            if bias is not None:
                tensors[f"{name}.bias"] = bias.detach
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            tensors |= {f"{name}.{key}": value.detach for key, value in trained.state_dict(keep_vars=True).items()}
    adapter_parts = (".lora_", ".base_layer.", ".modules_to_save.", ".original_module.")
    for key, value in base.state_dict(keep_vars=True).items():
        if not any(part in key for part in adapter_parts):
            tensors.setdefault(key, value.detach)
    return tensors


def behind(get: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """The parameters and buffers that a function of `standalone_tensors` computes from."""
    if isinstance(get, partial):
        return list(get.args[0].parameters())
    bound: Any = get  # the `detach` of a tensor
    return [bound.__self__]


def shared_ties(model: Any, tensors: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, bool]:
    """For each name of `standalone_tensors` that the model ties to another: whether the two are one weight still.

    An adapter on one of them parts them.
    """
    ties = getattr(base_model(model), "all_tied_weights_keys", {})
    found = {}
    for name, source in ties.items():
        if name in tensors and source in tensors:
            one, other = tensors[name], tensors[source]
            is_adapted = isinstance(one, partial) or isinstance(other, partial)
            found[name] = not is_adapted and behind(one)[0] is behind(other)[0]
    return found


@torch.no_grad()
def _merged_weight(module: Any) -> torch.Tensor:
    weight: torch.Tensor = module.get_base_layer().weight
    for adapter in module.active_adapters:
        weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return weight
