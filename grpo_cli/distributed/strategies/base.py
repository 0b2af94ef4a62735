"""What every strategy gives the training loop."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.errors import RunError
from grpo_cli.recipe.schema import ModelConfig
from grpo_cli.recipe.strategies import StrategyTraits

OptimizerState = dict[str, Any]
"""As torch's `Optimizer.state_dict`: `state` by the number of a parameter, `param_groups`. A part of one has some
parameters' state only. `MASTER` in a parameter's state is its float32 original, where the model holds less."""

MASTER = "master"

Compute = Callable[..., Any]


class Strategy(ABC):
    """Spreads a model over processes. All methods are called on all ranks alike, and in the same order.

    A method that is not abstract is written for ranks that hold whole weights.
    """

    traits: StrategyTraits
    run: Compute | None = None
    """Calls a function with its arguments, which may compute with the policy and any part of it, also for a
    backward pass. None where nothing has to happen before or after."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    @property
    def runs_alike(self) -> bool:
        return self.traits.runs_alike

    @property
    def shards_weights(self) -> bool:
        return self.traits.shards_weights

    def loading(self, config: ModelConfig) -> AbstractContextManager[bool]:
        """Inside, a model is loaded, which may be in parts already. Gives whether this process reads its weights;
        where it does not, the model is built without values, and `take` or `prepare` gives it those of rank 0."""
        return nullcontext(self._ranks.is_main)

    @abstractmethod
    def take(self, model: Any) -> None:
        """Make a model that was just loaded, or made by each process, the same on all ranks, before an optimizer
        holds its parameters."""

    def copied(self, model: Any) -> Any:
        """A copy of a model after `take` and before `prepare`, for `prepare_frozen`. None where no rank holds the
        whole model, which then has to be loaded again."""
        return copy.deepcopy(model)

    @abstractmethod
    def prepare(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Spread the model and its optimizer; both are changed in place.

        Raises:
            UserError: the optimizer cannot be used under this strategy.
        """

    @abstractmethod
    def prepare_frozen(self, model: Any) -> Compute | None:
        """Spread a model that is not trained, with rank 0's values; return what runs it, as `run` the policy."""

    def whole_model(self) -> AbstractContextManager[None]:
        """Inside, every rank holds the whole policy and may run it by itself, without gradients."""
        return nullcontext()

    def gathered(self, tensors: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        """Inside, these parameters are whole on every rank, to be read through `whole`."""
        return nullcontext()

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter, or what was computed of some, put together where ranks hold parts; inside `gathered`."""
        return tensor

    def whole_shape(self, tensor: torch.Tensor) -> torch.Size:
        """The shape that `whole` gives a parameter or buffer, at any time."""
        return tensor.shape

    @abstractmethod
    def zero_grad(self) -> None:
        """Begin an optimizer step."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's share of the loss, which is a sum over ranks."""

    @abstractmethod
    def step(self) -> float:
        """Sum the gradient over ranks, clip it, update the policy; return the norm before clipping.

        Raises:
            GradientNotFinite: it has no finite norm, on all ranks alike; policy and optimizer are as they were.
        """

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """This rank's part of the optimizer's state, on the CPU; the parts of all ranks make the whole."""

    @abstractmethod
    def restore(self, weights: Mapping[str, torch.Tensor] | None, state: OptimizerState) -> None:
        """Load a checkpoint.

        Args:
            weights: by the names of the policy's state dict; on rank 0 only.
            state: of the whole optimizer.
        """


class GradientNotFinite(RunError):
    """The gradient's norm is not a number, or infinite."""


def checked_norm(norm: Any) -> float:
    """The gradient's norm as a float.

    Raises:
        GradientNotFinite: it is none.
    """
    value = float(norm)
    if not math.isfinite(value):
        raise GradientNotFinite(f"norm {value}")
    return value


class Root(nn.Module):
    """What an engine wraps in place of the model: its forward pass is any computation with the model's parts.

    Log-probabilities are computed without the model's own forward pass, since whole logits would not fit. Engines
    hook forward passes of the module that they were given.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Compute, *arguments: Any) -> Any:
        """`compute(*arguments)`."""
        return compute(*arguments)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer step changes, each with a gradient.

    One that no pack has reached gets a gradient of 0: its momentum goes on, as it would had the groups that were
    left out been forwarded.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return trained


def is_elementwise(value: Any) -> bool:
    """Whether part of a parameter's state has an entry for each of the parameter's own, as a momentum has."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def on_cpu(values: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state with tensors of its own on the CPU: none shares memory with another parameter's."""
    return {
        key: value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
        for key, value in values.items()
    }


def part_of_state(state: OptimizerState, rank: int, world_size: int) -> OptimizerState:
    """The share of one rank: every `world_size`-th parameter's state."""
    own = {index: values for index, values in state["state"].items() if index % world_size == rank}
    return {"state": own, "param_groups": state["param_groups"]}


def joined_state(parts: Sequence[OptimizerState]) -> OptimizerState:
    """The whole state that some parts make."""
    state = {index: values for part in parts for index, values in part["state"].items()}
    return {"state": dict(sorted(state.items())), "param_groups": parts[0]["param_groups"]}


def without_master(state: OptimizerState) -> OptimizerState:
    """The state without float32 originals, for a model that is one itself."""
    kept = {
        index: {key: value for key, value in values.items() if key != MASTER}
        for index, values in state["state"].items()
    }
    return {"state": kept, "param_groups": state["param_groups"]}
