"""What of a model's log-probabilities can be computed the fast ways, asked of the model itself on twenty tokens.

Whether a model may share prompts is two questions, and a low precision's noise must answer neither. Is its
structure right, so that every layer hands positions, layout and window to its kernel and nothing else mixes
tokens? That is asked in float32, where packed and plain rows agree to rounding or not at all. Does this device's
kernel work in the precision of training? That is asked of each layer by itself, against dense attention over the
same queries, keys and values: differences do not add up over layers, and what rounding may do is bounded by the
size of the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import embedding, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from grpo_cli.algorithm.branches import Branches
from grpo_cli.algorithm.packing import Group, Pack, pack_groups
from grpo_cli.errors import one_line
from grpo_cli.policy import attention
from grpo_cli.policy.attention import LayerInputs, RowLayout
from grpo_cli.policy.model import base_model
from grpo_cli.policy.output_head import OutputHead, possible_forms

if TYPE_CHECKING:
    from grpo_cli.policy.logprobs import PackedModel

TOLERANCE = 1e-3
"""Largest difference between two ways to compute float32 log-probabilities: in nats, or as a share of what other
tokens would change, whichever is more."""

LEAK = 1e-3
"""What one completion's tokens may move in another, as a share of what they move in their own."""

KERNEL_TOLERANCE = 1 / 16
"""Largest error of a layer's kernel as a share of its largest value. Attention averages values, so rounding to
bfloat16 can cost 1/256 of it; a token too many or too few costs more than this."""

SHARED_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers, as configurations name them, that can compute a shared-prompt row. Others are refused by name:
chunked attention, for one, goes wrong only in rows that are longer than those of the self-check."""

HALVES = (torch.float16, torch.bfloat16)

LONGEST_REASON = 300


class NotShared(Exception):
    """Why a model cannot compute shared-prompt packs."""


def find_logit_form(policy: PackedModel, seed: int = 0) -> None:
    """Set the form of logits in which the output head, read as a matrix, gives the model's own values; or None."""
    policy.logit_form = None
    forms = possible_forms(policy.model)
    if OutputHead.of(policy.model, forms[0]) is None:
        return
    pack = _packed(policy, self_check_groups(policy.config.vocab_size, seed)[0], shared_prompt=False)
    with _in_float32(policy):
        expected, _ = policy.token_logprobs(pack, 1.0)
        for form in forms:
            policy.logit_form = form
            try:
                actual, _ = policy.token_logprobs(pack, 1.0)
            except (RuntimeError, ValueError, TypeError, AttributeError):
                break
            if (actual - expected).abs().max().item() < TOLERANCE:  # never, where there is a NaN
                return
    policy.logit_form = None


def why_not_shared(policy: PackedModel, seed: int = 0) -> str | None:
    """The reason why the model must have plain rows; None if it can share prompts, and then its kernel is ours.

    Args:
        policy: in evaluation mode, under the autocast of training.
        seed: of the tokens.
    """
    config = policy.config
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - SHARED_LAYERS)
    if foreign:
        return f"its layers are of kind {', '.join(foreign)}"
    if config._attn_implementation not in ("sdpa", attention.KERNEL):
        asked = "model.attn_implementation: only auto and sdpa let it be replaced"
        return f"its attention kernel is {config._attn_implementation}; {asked}"
    base_model(policy.model).set_attn_implementation(attention.KERNEL)
    reason = None
    try:
        _check_structure(policy, seed)
        _check_kernel(policy, seed)
        _check_gradient(policy, seed)
    except NotShared as error:
        reason = str(error)
    except Exception as error:  # of any kind: the model's code, its hooks and a GPU's compiler run in there
        reason = f"{type(error).__name__}: {one_line(error)}"[:LONGEST_REASON]
    if reason is not None:
        base_model(policy.model).set_attn_implementation("sdpa")
    return reason


def self_check_groups(vocab_size: int, seed: int) -> tuple[list[Group], list[Group]]:
    """A group and a tree of turns, of random tokens, and the same with another first completion."""
    tokens = torch.randint(vocab_size, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    prompt, other_prompt = tokens[:3], tokens[6:8]
    contexts = [other_prompt[:1], other_prompt, [other_prompt[0], tokens[8]]]
    turns = [[other_prompt[1], *tokens[9:11]], tokens[11:13], tokens[13:15]]
    tree = Group(other_prompt[:1], turns, [2, 3, 4], prompts=contexts)
    first, changed, second = tokens[3:6], tokens[15:18], tokens[18:]
    return [Group(prompt, [first, second], [0, 1]), tree], [Group(prompt, [changed, second], [0, 1]), tree]


def _check_structure(policy: PackedModel, seed: int) -> None:
    """Ask the model: a layer that drops the layout, the positions or its window gives itself away."""
    groups, changed = self_check_groups(policy.config.vocab_size, seed)
    windows: dict[int, int] = {}

    def logprobs(groups: list[Group], shared_prompt: bool) -> torch.Tensor:
        pack = _packed(policy, groups, shared_prompt)
        layout = None if pack.branches is None else DenseLayout(pack.branches)
        logprobs, _ = policy.token_logprobs(pack, 1.0, layout=layout)
        windows.update(layout.windows if layout else {})
        return logprobs[pack.samples.argsort()]

    with _in_float32(policy):
        packed, plain, moved = logprobs(groups, True), logprobs(groups, False), logprobs(changed, True)
    if not plain.isfinite().all():
        raise NotShared("its log-probabilities are not finite in float32")
    difference = (packed - plain).abs().max().item()
    moves = (packed - moved).abs()
    leak, effect = moves[1:].max().item(), moves[0].max().item()
    # Asked so that a NaN anywhere fails.
    if not leak < LEAK * effect:
        raise NotShared("in its layers one completion's tokens change another's log-probabilities")
    if not difference < TOLERANCE * max(1.0, effect):
        raise NotShared(f"its layers give log-probabilities {difference:.2g} nats from those of plain rows")
    if windows != _windows(policy.config):  # these rows are too short to show it
        raise NotShared("its layers do not tell the attention kernel their sliding windows")


def _windows(config: Any) -> dict[int, int]:
    """The sliding windows of a model's layers, by its configuration."""
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return {}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {layer: window for layer, kind in enumerate(kinds) if kind == "sliding_attention"}


def _check_kernel(policy: PackedModel, seed: int) -> None:
    """Run the device's kernel in the precision of training."""
    pack = _packed(policy, self_check_groups(policy.config.vocab_size, seed)[0])
    assert pack.branches is not None
    layout = _WatchedLayout(pack.branches)
    logprobs, entropies = policy.token_logprobs(pack, 1.0, layout=layout)
    precision = str(policy.dtype).removeprefix("torch.")
    if not (logprobs.isfinite().all() and entropies.isfinite().all()):
        raise NotShared(f"its log-probabilities are not finite in {precision}")
    for layer, (error, leak, effect) in layout.found.items():
        if not leak <= LEAK * effect:
            raise NotShared(f"the attention kernel lets completions see each other in layer {layer} ({precision})")
        if not error < KERNEL_TOLERANCE:
            raise NotShared(
                f"the attention kernel is off by {error:.2g} of the values in layer {layer} ({precision})"
            )


def _check_gradient(policy: PackedModel, seed: int) -> None:
    """Run the kernel's backward pass, rather than have it fail after a whole rollout.

    Not where others run the model: their bookkeeping of gradients is for optimizer steps.
    """
    trained = next((p for p in policy.model.parameters() if p.requires_grad), None)
    if trained is None or not policy.is_whole:
        return
    with torch.enable_grad():
        pack = _packed(policy, self_check_groups(policy.config.vocab_size, seed)[0])
        logprobs, _ = policy.token_logprobs(pack, 1.0)
        (gradient,) = torch.autograd.grad(logprobs.sum(), trained, allow_unused=True)
    if gradient is not None and not gradient.isfinite().all():
        raise NotShared("the gradients of a shared-prompt row are not finite")


def _packed(policy: PackedModel, groups: list[Group], shared_prompt: bool = True) -> Pack:
    (pack,) = pack_groups(groups, 64, shared_prompt=shared_prompt)
    return pack.to(policy.device)


class DenseLayout(RowLayout):
    """The row under a dense mask: exact in any precision, and no kernel has to be compiled for it."""

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """See `TokenLayout.attend`."""
        self.note_window(inputs)
        return _dense_attention(self.branches, inputs).to(inputs.query.dtype)


class _WatchedLayout(RowLayout):
    """The row by the device's kernel; at every layer it is compared, and asked whether branches see each other."""

    def __init__(self, branches: Branches) -> None:
        super().__init__(branches)
        self.found: dict[int, tuple[float, float, float]] = {}
        """By layer: the error as a share of the values, what another first branch moves in others, in itself."""

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """See `TokenLayout.attend`."""
        attended = super().attend(inputs)
        error = (attended.float() - _dense_attention(self.branches, inputs)).abs().max()
        first = self.branches.stems[0]
        branch = slice(first.stop, first.stop + first.branch_lengths[0])
        key, value = inputs.key.clone(), inputs.value.clone()
        key[:, :, branch], value[:, :, branch] = -key[:, :, branch], -value[:, :, branch]
        moved = (attended - super().attend(replace(inputs, key=key, value=value))).float().abs()
        effect = moved[:, :, branch].max().item()
        moved[:, :, branch] = 0
        self.found[inputs.layer] = (error / inputs.value.float().abs().max()).item(), moved.max().item(), effect
        return attended


def _dense_attention(branches: Branches, inputs: LayerInputs) -> torch.Tensor:
    """(1, H, L, D) under a mask of every pair of tokens, in float32 at least."""
    places = torch.arange(inputs.query.shape[2], device=inputs.query.device)
    mask = branches.sees(places[:, None], places, inputs.window)
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)
    query, key, value = (part.to(dtype) for part in (inputs.query, inputs.key, inputs.value))
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    with torch.autocast(query.device.type, enabled=False):
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=inputs.scale)


@contextmanager
def _in_float32(policy: PackedModel) -> Iterator[None]:
    """Without autocast, and with half-precision weights lifted to float32 one at a time, where they are used."""
    has_halves = any(parameter.dtype in HALVES for parameter in policy.model.parameters())
    with torch.autocast(policy.device.type, enabled=False), _Lifting() if has_halves else nullcontext():
        yield


class _Lifting(TorchFunctionMode):
    """Embeddings come out in float32, and what meets float32 becomes it: no second model is needed in memory."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dtypes = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        name = getattr(function, "__name__", "")
        in_place = name.startswith("__i") or name == "__setitem__" if name.endswith("__") else name.endswith("_")
        writes = in_place or "out" in kwargs  # into a tensor as it is
        if torch.float32 in dtypes and not dtypes.isdisjoint(HALVES) and not writes:
            args, kwargs = tree_map(_lifted, (args, kwargs))
        result = function(*args, **kwargs)
        return _lifted(result) if function is embedding else result


def _lifted(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value
