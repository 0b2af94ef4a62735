"""The policy's weights as a server is given them: under a checkpoint's names, tied ones once, adapters merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from grpo_cli.distributed.strategies import Strategy
from grpo_cli.errors import UserError
from grpo_cli.policy.model import base_model, behind, shared_ties, standalone_tensors
from grpo_cli.serve.protocol import TensorSpec


class PolicyWeights:
    """A view of the policy: `gathered` gives what the weights are when it is entered.

    Args:
        model: a transformers model or its PEFT wrapper; it is not changed.
        strategy: puts its weights together where they are in parts; without one they are not.
        device: that they are gathered on, if that is not where they are.

    Raises:
        UserError: a server cannot be given such weights.
    """

    def __init__(self, model: Any, strategy: Strategy | None = None, device: torch.device | None = None) -> None:
        base = base_model(model)
        if get_model_conversion_mapping(base, add_legacy=False):
            raise UserError(
                f"model.name: transformers keeps the weights of a {base.config.model_type} in another shape than "
                "its checkpoints, and vLLM takes only the latter; use generation.engine: transformers"
            )
        self._tensors = standalone_tensors(model)
        parts = (".base_layer.", ".original_module.")  # what an adapter wraps
        parameters = {name.replace(parts[0], ".").replace(parts[1], ".") for name, _ in base.named_parameters()}
        for name, is_shared in shared_ties(model, self._tensors).items():
            if not is_shared:
                raise UserError(
                    f"model.lora: an adapter parts {name} from the weight that the model ties it to, which vLLM "
                    "cannot serve; leave both out of target_modules and modules_to_save"
                )
            del self._tensors[name]
        self._parameters = parameters
        self._strategy = strategy
        self.announce: Callable[[Sequence[str]], AbstractContextManager[None]] = lambda names: nullcontext()
        """Entered before weights are gathered, with their names: who else has to gather them is told so."""
        self.device: torch.device = device or base.device

    def _origin(self, name: str) -> torch.Tensor:
        """The parameter or buffer behind a name: the one that an adapter changes, if there is one."""
        get: Any = self._tensors[name]
        return get.args[0].get_base_layer().weight if isinstance(get, partial) else behind(get)[0]

    def specs(self, dtype: str) -> list[TensorSpec]:
        """What will be sent: parameters in the server's `dtype`, buffers in their own."""
        specs = []
        for name in self._tensors:
            tensor = self._origin(name)
            is_cast = tensor.is_floating_point() and name in self._parameters
            own = str(tensor.dtype).removeprefix("torch.")
            shape = list(tensor.shape if self._strategy is None else self._strategy.whole_shape(tensor))
            specs.append(TensorSpec(name=name, dtype=dtype if is_cast else own, shape=shape))  # type: ignore[arg-type]
        return specs

    @contextmanager
    def gathered(self, names: Sequence[str]) -> Iterator[Callable[[str], torch.Tensor]]:
        """Gives what `tensor` gives, which may be asked for these names, once and in this order."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread has a current device of its own
        needed = [tensor for name in names for tensor in behind(self._tensors[name])]
        strategy = self._strategy
        left = list(names)

        def tensor(name: str) -> torch.Tensor:
            left.remove(name)
            return self.tensor(name)

        with self.announce(names), nullcontext() if strategy is None else strategy.gathered(needed):
            try:
                yield tensor
            finally:
                # Where each of them takes all ranks, the others are waiting for those that an error left over.
                for name in left if strategy is not None else ():
                    self.tensor(name)

    def join_gathering(self, names: Sequence[str]) -> None:
        """Do this rank's part of what another does with `gathered`."""
        with self.gathered(names) as tensor:
            for name in names:
                tensor(name)

    @torch.no_grad()
    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, merged with its adapter if it has one."""
        tensor = self._tensors[name]()
        return tensor if self._strategy is None else self._strategy.whole(tensor)
