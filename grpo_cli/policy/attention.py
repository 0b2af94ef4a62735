"""Attention over shared-prompt rows: tokens see what comes before them in their own sequences, and no more is
computed.

transformers calls `shared_prompt_attention` in every layer of a model whose attention implementation is KERNEL.
The row's structure comes as the keyword argument LAYOUT, which models hand through to their kernel; without it the
kernel is plain SDPA.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_cli.algorithm.branches import Branches, Stem
from grpo_cli.errors import RunError
from grpo_cli.policy.block_mask import block_mask
from grpo_cli.recipe.limits import mask_length

KERNEL = "shared_prompt"
LAYOUT = "token_layout"
"""Keyword argument of a model's forward that says how its tokens see each other."""

COMPILED_VARIANTS = 64
"""Shapes and modes that FlexAttention may be compiled for."""

BLIND = -1e30
"""The log-sum-exp of a token that sees none of some keys: it gives no weight next to any other, and is finite, so
that two of them have a difference."""


@dataclass(frozen=True)
class LayerInputs:
    """What a layer asks its kernel to attend with."""

    layer: int
    query: torch.Tensor  # (R, H, L, D)
    key: torch.Tensor  # (R, K, L, D)
    value: torch.Tensor  # (R, K, L, D)
    scale: float
    window: int | None
    """Positions that a query sees, its own included; None for all."""


class TokenLayout(Protocol):
    """What computes the attention of a forward pass, layer by layer."""

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """(R, H, L, D), what each query attends to."""
        ...


def shared_prompt_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The kernel as transformers calls it: (R, H, L, D) queries to (R, L, H, D) outputs.

    Raises:
        ValueError: the model asks for something that the shared-prompt kernel does not compute.
    """
    layout: TokenLayout | None = kwargs.pop(LAYOUT, None)
    if layout is None:
        arguments = kwargs | {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    extra = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if extra or dropout:
        raise ValueError(f"shared-prompt attention has no {', '.join(extra) or 'dropout'}")
    if key.shape[-1] != value.shape[-1]:
        raise ValueError("shared-prompt attention needs keys and values of one size")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As autocast does for SDPA: rotary embeddings leave queries and keys in float32, values in bfloat16.
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    attended = layout.attend(LayerInputs(module.layer_idx, query, key, value, scale, sliding_window))
    return attended.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(KERNEL, shared_prompt_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(KERNEL, sdpa_mask)


class RowLayout:
    """One row of stems and their branches.

    Args:
        branches: on the device of the row.
    """

    def __init__(self, branches: Branches) -> None:
        self.branches = branches
        self.windows: dict[int, int] = {}
        """Sliding windows by layer, as the layers asked for them."""
        self._block_masks: dict[int | None, BlockMask] = {}

    def attend(self, inputs: LayerInputs) -> torch.Tensor:
        """See `TokenLayout.attend`; the row is the only one."""
        self.note_window(inputs)
        if inputs.query.device.type != "cpu":
            return self._flex(inputs)
        attended: torch.Tensor = _BranchedAttention.apply(
            inputs.query, inputs.key, inputs.value, self.branches, inputs.scale, inputs.window
        )
        return attended

    def note_window(self, inputs: LayerInputs) -> None:
        """Remember what the layer said of its window."""
        if inputs.window is not None:
            self.windows[inputs.layer] = inputs.window

    def _flex(self, inputs: LayerInputs) -> torch.Tensor:
        """FlexAttention: rows are padded here, where blocks of padding are skipped, not in the whole model."""
        length, window = inputs.query.shape[2], inputs.window
        first, *others = self.branches.stems
        if not others and not first.branch_lengths and (window is None or length <= window):  # a lone prompt
            parts = inputs.query, inputs.key, inputs.value
            return scaled_dot_product_attention(*parts, is_causal=True, scale=inputs.scale, enable_gqa=True)
        if window not in self._block_masks:
            self._block_masks[window] = block_mask(self.branches, window)
        padding = (0, 0, 0, mask_length(length) - length)
        padded = (pad(part, padding).contiguous() for part in (inputs.query, inputs.key, inputs.value))
        mask = self._block_masks[window]
        attended = compiled_flex_attention(*padded, block_mask=mask, scale=inputs.scale, enable_gqa=True)
        return attended[:, :, :length]


def compiled_flex_attention(*inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    """FlexAttention in one kernel.

    Raises:
        RunError: it would have to be compiled for more than COMPILED_VARIANTS shapes and modes.
    """
    # Each length compiles anew for generation, scoring and training, with and without a window. torch keeps the
    # limit for each thread, that of backward passes included, in which gradient checkpointing computes again.
    with torch._dynamo.config.patch(recompile_limit=COMPILED_VARIANTS):
        try:
            attended: torch.Tensor = _compiled()(*inputs, **options)
        except FailOnRecompileLimitHit as error:
            raise RunError(
                f"FlexAttention has been compiled {COMPILED_VARIANTS} times, and is asked for one shape more; "
                "set model.attn_implementation to eager, or train.max_tokens_per_microbatch to one pack size"
            ) from error
    return attended


@functools.cache
def _compiled() -> Any:
    # As a whole, or past the limit torch falls back to whole score matrices with no more than a warning.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


class _BranchedAttention(torch.autograd.Function):
    """CPU attention of a row by parts: stems and branches over themselves, and over the stems they go on from.

    For each stem, what goes on from it attends to its keys in one call; branches of a stem are a batch. Parts are
    merged by their log-sum-exps (FlashAttention, arXiv:2205.14135, section 3.1). Given the merged output and
    log-sum-exp, the backward kernel of each part computes that part's exact gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        branches: Branches,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        _, heads, length, head_dim = query.shape
        out = query.new_empty(1, length, heads, head_dim).transpose(1, 2)  # (1, H, L, D)
        lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = torch.empty(1, heads, length, dtype=lse_dtype)
        above = _Parts(0, out, lse)  # over the stems so far, for what goes on from them
        for stem in branches.stems:
            masks = _Masks(branches, stem, window, query.dtype)
            own, after = slice(stem.start, stem.stop), slice(stem.stop, stem.end)
            inputs = [part[:, :, own] for part in (query, key, value)]
            flash = _flash(*inputs, is_causal=True, mask=masks.own, scale=scale)
            if stem.begins:
                out[:, :, own], lse[:, :, own] = flash
            else:
                _merge(above.of(own), flash, into=(out[:, :, own], lse[:, :, own]))
            if stem.stop == stem.end:
                continue
            inputs = [query[:, :, after], key[:, :, own], value[:, :, own]]
            flash = _flash(*inputs, is_causal=False, mask=masks.after, scale=scale)
            flash[1].masked_fill_(masks.blind, BLIND)
            if stem.begins:
                above = _Parts(stem.stop, *flash)
            else:
                _merge(above.of(after), flash, into=above.of(after))
            if not stem.branch_lengths:
                continue
            shape, side_by_side = _Padding(stem.branch_lengths), slice(stem.stop, stem.branches_end)
            inputs = [shape.pad(part[:, :, side_by_side]) for part in (query, key, value)]
            out_own, lse_own = map(shape.unpad, _flash(*inputs, is_causal=True, mask=masks.branches, scale=scale))
            into = out[:, :, side_by_side], lse[:, :, side_by_side]
            _merge(above.of(side_by_side), (out_own, lse_own), into=into)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.arguments = branches, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = (grads[0], *ctx.saved_tensors)
        query, key, value = saved[1:4]
        branches, scale, window = ctx.arguments
        # Laid out as the projections' outputs are, so that no copy follows.
        grad_query, grad_key, grad_value = (
            torch.empty_like(part.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for part in (query, key, value)
        )
        for stem in branches.stems:
            masks = _Masks(branches, stem, window, query.dtype)
            own, after = slice(stem.start, stem.stop), slice(stem.stop, stem.end)
            parts = (part[:, :, own] for part in saved)
            flash = _flash_backward(*parts, is_causal=True, mask=masks.own, scale=scale)
            if stem.begins:
                grad_query[:, :, own] = flash[0]
            else:
                grad_query[:, :, own] += flash[0]
            grad_key[:, :, own], grad_value[:, :, own] = flash[1:]
            if stem.stop == stem.end:
                continue
            grad_out, after_query, _, _, out, lse = (part[:, :, after] for part in saved)
            inputs = [grad_out, after_query, key[:, :, own], value[:, :, own], out, lse]
            flash = _flash_backward(*inputs, is_causal=False, mask=masks.after, scale=scale)
            if stem.begins:
                grad_query[:, :, after] = flash[0]
            else:
                grad_query[:, :, after] += flash[0]
            grad_key[:, :, own] += flash[1]
            grad_value[:, :, own] += flash[2]
            if not stem.branch_lengths:
                continue
            shape, side_by_side = _Padding(stem.branch_lengths), slice(stem.stop, stem.branches_end)
            *inputs, lse = (part[:, :, side_by_side] for part in saved)
            inputs = [shape.pad(part) for part in inputs]
            # With an infinite log-sum-exp, padding gets no weight and so no gradient.
            padded_lse = shape.pad(lse, math.inf)
            flash = _flash_backward(*inputs, padded_lse, is_causal=True, mask=masks.branches, scale=scale)
            own_query, own_key, own_value = map(shape.unpad, flash)
            grad_query[:, :, side_by_side] += own_query
            grad_key[:, :, side_by_side] = own_key
            grad_value[:, :, side_by_side] = own_value
        return grad_query, grad_key, grad_value, None, None, None


Part = tuple[torch.Tensor, torch.Tensor]
"""(1, H, M, D) outputs of attention to some keys, and (1, H, M) log-sum-exps."""


@dataclass(frozen=True)
class _Parts:
    """What a run of a row's tokens attends to, in part."""

    start: int
    """Where the run begins."""
    out: torch.Tensor  # (1, H, M, D)
    lse: torch.Tensor  # (1, H, M)

    def of(self, places: slice) -> Part:
        """The share of some of the row's places."""
        within = slice(places.start - self.start, places.stop - self.start)
        return self.out[:, :, within], self.lse[:, :, within]


def _merge(one: Part, other: Part, *, into: Part) -> None:
    """Attention to the keys of both parts, whose outputs are used up for it."""
    merged = torch.logaddexp(one[1], other[1])  # (1, H, M)
    one[0].mul_((one[1] - merged).exp_()[..., None])
    other[0].mul_((other[1] - merged).exp_()[..., None])
    torch.add(one[0], other[0], out=into[0])
    into[1].copy_(merged)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, H, L, D) outputs and (R, H, L) log-sum-exps; a mask holds causality too."""
    outputs: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal and mask is None, attn_mask=mask, scale=scale
    )
    return outputs


def _flash_backward(
    *tensors: torch.Tensor, is_causal: bool, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from grad_out, query, key, value, out and log-sum-exp."""
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, 0.0, is_causal and mask is None, attn_mask=mask, scale=scale
    )
    return grads


class _Padding:
    """Branches side by side in a row to one batch of rows, padded to the longest, and back."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.shape = len(lengths), max(lengths)  # B, T
        self.places = self.mask = None
        if min(lengths) < max(lengths):
            steps = torch.arange(max(lengths))
            self.mask = steps < torch.tensor(lengths)[:, None]  # (B, T)
            starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
            self.places = (starts[:, None] + steps).clamp(max=sum(lengths) - 1)  # (B, T)

    def pad(self, row: torch.Tensor, filler: float | None = None) -> torch.Tensor:
        """(1, H, M, …) to (B, H, T, …); padding repeats other tokens unless there is a filler."""
        if self.places is None or self.mask is None:
            return row[0].unflatten(1, self.shape).transpose(0, 1)
        rows = row[0][:, self.places]  # (H, B, T, …)
        if filler is not None:
            rows.masked_fill_(~self.mask, filler)
        return rows.transpose(0, 1)

    def unpad(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, H, T, …) to (1, H, M, …)."""
        rows = rows.transpose(0, 1)
        return (rows.flatten(1, 2) if self.mask is None else rows[:, self.mask])[None]


class _Masks:
    """Additive masks of a stem's three parts; None where causality says it all, as it does without a window."""

    def __init__(self, branches: Branches, stem: Stem, window: int | None, dtype: torch.dtype) -> None:
        self.own = self.after = self.branches = None
        self.blind = torch.tensor(False)  # (M,): which tokens that go on from the stem see nothing of it
        if window is None:
            return
        positions = branches.positions[stem.start : stem.end] - stem.position
        if int(positions.max()) < window:
            return
        longest = max(stem.branch_lengths, default=0)
        steps = torch.arange(max(stem.length, longest))
        ages = steps[:, None] - steps
        hidden = (ages < 0) | (ages >= window)
        self.own = _additive(hidden[: stem.length, : stem.length], dtype)
        self.branches = _additive(hidden[:longest, :longest], dtype)
        too_old = positions[stem.length :, None] - steps[: stem.length] >= window  # (M, P)
        self.after = _additive(too_old, dtype)
        self.blind = too_old.all(1)


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(1, 1, *hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
