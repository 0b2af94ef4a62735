"""The policy's weights as a server is given them: under a checkpoint's names, tied ones once, adapters merged."""

from __future__ import annotations

from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from grpo_cli.errors import UserError
from grpo_cli.policy.model import base_model, standalone_tensors
from grpo_cli.serve.protocol import TensorSpec


class PolicyWeights:
    """A view of the policy: `tensor` gives what the weights are when it is called.

    Args:
        model: a transformers model or its PEFT wrapper; it is not changed.

    Raises:
        UserError: a server cannot be given such weights.
    """

    def __init__(self, model: Any) -> None:
        base = base_model(model)
        if get_model_conversion_mapping(base, add_legacy=False):
            raise UserError(
                f"model.name: transformers keeps the weights of a {base.config.model_type} in another shape than "
                "its checkpoints, and vLLM takes only the latter; use generation.engine: transformers"
            )
        self._tensors = standalone_tensors(model)
        parts = (".base_layer.", ".original_module.")  # what an adapter wraps
        parameters = {name.replace(parts[0], ".").replace(parts[1], ".") for name, _ in base.named_parameters()}
        ties = getattr(base, "all_tied_weights_keys", {})
        for name, source in ties.items():
            if name in self._tensors and source in self._tensors and not self._is_shared(name, source):
                raise UserError(
                    f"model.lora: an adapter on {name} or {source} parts two weights that the model ties, which "
                    "vLLM cannot serve; leave them out of target_modules and modules_to_save"
                )
            self._tensors.pop(name, None)
        self._parameters = parameters
        self._specs: dict[str, list[TensorSpec]] = {}
        self.device: torch.device = base.device

    def _is_shared(self, name: str, source: str) -> bool:
        return self._tensors[name]().data_ptr() == self._tensors[source]().data_ptr()

    def specs(self, dtype: str) -> list[TensorSpec]:
        """What will be sent: parameters in the server's `dtype`, buffers in their own."""
        if dtype not in self._specs:  # for the shape of a weight with an adapter, the two are merged
            self._specs[dtype] = self._make_specs(dtype)
        return self._specs[dtype]

    def _make_specs(self, dtype: str) -> list[TensorSpec]:
        specs = []
        for name, get in self._tensors.items():
            tensor = get()
            is_cast = tensor.is_floating_point() and name in self._parameters
            own = str(tensor.dtype).removeprefix("torch.")
            specs.append(TensorSpec(name=name, dtype=dtype if is_cast else own, shape=list(tensor.shape)))  # type: ignore[arg-type]
        return specs

    @torch.no_grad()
    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, merged with its adapter if it has one."""
        return self._tensors[name]()
