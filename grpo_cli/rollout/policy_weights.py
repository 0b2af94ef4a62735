"""The policy's weights as a server is given them: under a checkpoint's names, tied ones once, adapters merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from grpo_cli.errors import UserError
from grpo_cli.policy.export import Sharding, Unsharded, exported_tensors, gathered
from grpo_cli.policy.model import base_model
from grpo_cli.serve.protocol import TensorSpec


class PolicyWeights:
    """A view of the policy: it gives what the weights are when they are asked for.

    Args:
        model: a transformers model or its PEFT wrapper; it is not changed.
        strategy: puts its weights together where they are in parts; without one they are not.
        device: that they are gathered on, if that is not where they are.

    Raises:
        UserError: a server cannot be given such weights.
    """

    def __init__(self, model: Any, sharding: Sharding | None = None, device: torch.device | None = None) -> None:
        base = base_model(model)
        if get_model_conversion_mapping(base, add_legacy=False):
            raise UserError(
                f"model.name: transformers keeps the weights of a {base.config.model_type} in another shape than "
                "its checkpoints, and vLLM takes only the latter; use generation.engine: transformers"
            )
        self._tensors = {tensor.name: tensor for tensor in exported_tensors(model)}
        for tensor in self._tensors.values():
            if tensor.is_parted:
                raise UserError(
                    f"model.lora: an adapter parts {tensor.name} from the weight that the model ties it to, which "
                    "vLLM cannot serve; leave both out of target_modules and modules_to_save"
                )
        self._sharding = sharding or Unsharded()
        self.announce: Callable[[Sequence[str]], AbstractContextManager[None]] = lambda names: nullcontext()
        """Entered before weights are gathered, with their names, to tell other ranks to gather them too."""
        self.device: torch.device = device or base.device

    def specs(self, dtype: str) -> list[TensorSpec]:
        """What will be sent: parameters in the server's `dtype`, buffers in their own."""
        specs = []
        for name, exported in self._tensors.items():
            tensor = exported.origin
            is_cast = tensor.is_floating_point() and isinstance(tensor, torch.nn.Parameter)
            own = str(tensor.dtype).removeprefix("torch.")
            shape = list(self._sharding.whole_shape(tensor))
            specs.append(TensorSpec(name=name, dtype=dtype if is_cast else own, shape=shape))  # type: ignore[arg-type]
        return specs

    @contextmanager
    def gathered(self, names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        """Gives what `tensor` gives, which may be asked for these names, once and in this order."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has a current device of its own
        with self.announce(names), gathered([self._tensors[name] for name in names], self._sharding) as tensor:
            yield tensor

    def join_gathering(self, names: Sequence[str]) -> None:
        """Do this rank's part of what another does with `gathered`."""
        with self.gathered(names):
            pass  # what is not asked for is put together all the same

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, merged with its adapter if it has one; inside `gathered` where weights are shared out."""
        return self._sharding.whole(self._tensors[name].compute())
