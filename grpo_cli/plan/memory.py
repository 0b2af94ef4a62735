"""What a run needs of each GPU's memory, in bytes, by arithmetic: pure functions of a recipe and a model's shape.

Weights, gradients, optimizer and reference are there all the time. The largest of three phases comes on top:
generation, forward and backward of one pack, the optimizer's step. Counted are the tensors that this code, torch
and DeepSpeed 0.19 allocate under the settings of `distributed.strategies`. Not counted are the gaps that torch's
allocator leaves between them, and what a `deepspeed_config` of the user's changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_cli.plan.setup import Setup
from grpo_cli.plan.shape import ModelShape, ModelSize
from grpo_cli.recipe.limits import (
    GRADIENT_BUCKET_BYTES,
    HEAD_BLOCK_BYTES,
    HEAD_CHUNK_BYTES,
    MASK_BLOCK,
    mask_length,
)

GIB = 2**30

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's buffer for gradients on their way to their owners."""

SUB_GROUP_ELEMENTS = 1_000_000_000
"""Parameters that DeepSpeed's ZeRO-3 optimizer updates at a time."""

CUDA_BYTES = 2 * GIB
"""CUDA's context, its libraries' workspaces and NCCL's buffers: an estimate."""

SAMPLING_BYTES = 16
"""Bytes for each logit while a token is drawn: itself in float32, its exponential in float32 and in float64."""

SERVER_BYTES = 2
"""Bytes of a weight in a rollout server, which keeps bfloat16."""


@dataclass(frozen=True)
class Part:
    """Something that takes memory."""

    name: str
    bytes: float
    detail: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """What each GPU holds."""

    lasting: Sequence[Part]
    """What is there all the time."""
    phases: dict[str, Sequence[Part]]
    """What is added in a phase, by its name."""
    host: float
    """Bytes in the CPU's memory, for each process."""

    @property
    def busiest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: total(self.phases[phase]))

    @property
    def peak(self) -> float:
        """Bytes on each GPU in the busiest phase."""
        return total(self.lasting) + total(self.phases[self.busiest])


def total(parts: Sequence[Part]) -> float:
    """Bytes of all parts."""
    return sum(part.bytes for part in parts)


def memory_plan(setup: Setup, size: ModelSize) -> MemoryPlan:
    """Add up a run's memory. Without a shape, what depends on it (activations, caches) is left out."""
    parameters, shape = size.parameters, size.shape
    assert parameters is not None
    trained = trained_parameters(setup, parameters, shape)
    lasting, host = lasting_parts(setup, parameters, trained)
    phases: dict[str, Sequence[Part]] = {
        "generation": generation_parts(setup, parameters, trained, shape),
        "training": training_parts(setup, parameters, trained, shape),
        "optimizer step": step_parts(setup, trained),
    }
    return MemoryPlan(lasting, phases, host)


def trained_parameters(setup: Setup, parameters: int, shape: ModelShape | None) -> int:
    """How many parameters are trained: all, or the adapter's (0 where the shape is not known: they are few)."""
    if setup.lora is None:
        return parameters
    return 0 if shape is None else shape.adapter_parameters(setup.lora)


def optimizer_bytes(setup: Setup) -> int:
    """Bytes that AdamW keeps for one trained parameter: two moments, and DeepSpeed's float32 master weight.

    DeepSpeed's stages 1 and 2 keep a master beside float32 weights too; stage 3 only where it is offloaded.
    Without DeepSpeed there is none, and the moments have the weights' precision.
    """
    if not setup.traits.uses_deepspeed:
        return 2 * (4 if setup.lora else setup.weight_bytes)
    is_own_master = setup.traits.shards_weights and setup.weight_bytes == 4 and not setup.cpu_offload
    return 8 if is_own_master else 12


def lasting_parts(setup: Setup, parameters: int, trained: int) -> tuple[list[Part], float]:
    """What is there all the time on each GPU, and bytes in host memory for each process."""
    weight_share, gradient_share, state_share = setup.weight_share, setup.gradient_share, setup.state_share
    trained_bytes = 4 if setup.lora and not setup.traits.uses_deepspeed else setup.weight_bytes
    gradient_bytes = 4 if setup.traits.uses_deepspeed else trained_bytes
    frozen = parameters if setup.lora else 0
    weights = (frozen * setup.weight_bytes + trained * trained_bytes) / weight_share
    gradients = trained * gradient_bytes / gradient_share
    optimizer = trained * optimizer_bytes(setup) / state_share
    reference = parameters * setup.weight_bytes / weight_share if setup.has_reference else 0.0
    master = "float32 master and " if optimizer_bytes(setup) == 12 else ""
    kept = f"{master}two moments: {optimizer_bytes(setup)} bytes each{_divided(state_share)}"
    host = 0.0
    if setup.cpu_offload:
        host, optimizer, kept = optimizer, 0.0, "in host memory"
        if setup.traits.uses_deepspeed:  # a float32 gradient, and in stages 1 and 2 a buffer for new weights
            host += trained * (4 + (0 if setup.traits.shards_weights else setup.weight_bytes)) / state_share
        if setup.traits.shards_weights:
            host += weights + gradients + reference
            weights = reference = 0.0
        if setup.traits.shards_gradients:
            gradients = 0.0
    return [
        Part("weights", weights, f"{parameters:,} x {setup.weight_bytes} bytes{_divided(weight_share)}"),
        Part("gradients", gradients, f"{trained:,} x {gradient_bytes} bytes{_divided(gradient_share)}"),
        Part("optimizer", optimizer, kept),
        Part("reference", reference, f"a second model{_divided(weight_share)}"),
        Part("CUDA, NCCL", CUDA_BYTES, "an estimate"),
    ], host


def _divided(by: int) -> str:
    return f", divided by {by}" if by > 1 else ""


def generation_parts(setup: Setup, parameters: int, trained: int, shape: ModelShape | None) -> list[Part]:
    """What generation adds on a training GPU; nothing where a server generates."""
    if setup.engine == "vllm":
        return [Part("vLLM's weights", parameters * SERVER_BYTES, "and its cache, from what is left")]
    parts: list[Part] = []
    if setup.engine != "transformers":
        return parts
    if setup.traits.shards_weights:
        parts.append(Part("gathered weights", parameters * setup.weight_bytes, "the whole model on every GPU"))
    if setup.has_autocast:
        cast = parameters if shape is None else shape.matrix_parameters
        cast += trained if setup.lora else 0
        parts.append(Part("weights in bfloat16", cast * setup.compute_bytes, "cast once for the rollout"))
    if shape is not None:
        cache = setup.cached_tokens * 2 * shape.layers * shape.kv_width * setup.compute_bytes
        parts.append(Part("keys and values", cache, f"{setup.cached_tokens} tokens"))
        drawn_from = setup.cached_rows * shape.vocabulary * (setup.compute_bytes + SAMPLING_BYTES)
        parts.append(Part("sampling", drawn_from, f"logits of {setup.cached_rows} tokens, summed in float64"))
    return parts


def layer_activation_bytes(shape: ModelShape, setup: Setup) -> int:
    """Bytes that one layer keeps of one token for its backward pass.

    With h, q, k, i the widths of the residual stream, of queries, of keys and of the MLP, and c bytes a value, two
    norms keep (4 + 2c) h + 4 each: the input in float32, the output before and after the norm's weight, and the
    root of the mean square. Attention keeps queries, keys, values and output, c (2q + 2k), and one float32 sum for
    each head, but no scores. The gated MLP keeps 4 c i. Under autocast norms are in float32, and each projection
    keeps a bfloat16 copy of its input.
    """
    c, h = setup.compute_bytes, shape.hidden
    norms = 2 * (8 * h + 4) + 5 * c * h if setup.has_autocast else 2 * ((4 + 2 * c) * h + 4)
    attention = c * (2 * shape.query_width + 2 * shape.kv_width) + 4 * shape.heads
    if shape.norms_heads:
        attention += (4 + c) * (shape.query_width + shape.kv_width) + 4 * (shape.heads + shape.kv_heads)
    return norms + attention + 4 * c * shape.intermediate


def training_parts(setup: Setup, parameters: int, trained: int, shape: ModelShape | None) -> list[Part]:
    """What forward and backward of one pack add.

    Activations are kept all the while. Beside them stands what the fuller of two moments needs: one is in the
    middle of a layer's backward pass, the other at the output head.
    """
    parts = []
    if setup.has_autocast and setup.traits.zero_stage != 3:
        parts.append(Part("weights in bfloat16", parameters * setup.compute_bytes, "kept by autocast"))
    if setup.traits.zero_stage == 1 and setup.weight_bytes == 2:
        parts.append(Part("the pack's gradients", trained * 2, "in bfloat16, beside their float32 sum"))
    if shape is None:
        return parts
    tokens, residual = setup.pack_tokens, setup.weight_bytes * shape.hidden
    layer = layer_activation_bytes(shape, setup)
    kept = residual if setup.gradient_checkpointing else layer
    how = "each layer's input" if setup.gradient_checkpointing else "all that backward needs"
    parts.append(Part("activations", tokens * shape.layers * kept, f"{tokens} tokens, {how}"))
    parts.append(Part("block mask", block_mask_bytes(tokens), "of FlexAttention"))
    flowing = 3 * setup.compute_bytes * shape.intermediate + 2 * residual
    again = layer if setup.gradient_checkpointing else 0
    buffer = _gradient_buffer(setup, shape)
    in_layer = [
        Part("one layer's backward", tokens * (again + flowing), "recomputed values and gradients"),
        *_gathered(setup, shape, at_head=False),
        *buffer,
    ]
    at_head = [
        Part("output head", head_bytes(setup, shape), "a chunk of logits, the head's gradient in float32"),
        *_gathered(setup, shape, at_head=True),
        *buffer,
    ]
    return parts + max(in_layer, at_head, key=total)


def block_mask_bytes(tokens: int) -> int:
    """Bytes of FlexAttention's mask, whose entries are pairs of blocks.

    Four orders of the blocks take 4 bytes an entry, and one of them 8 more while it is sorted.
    """
    return (mask_length(tokens) // MASK_BLOCK) ** 2 * (4 * 4 + 8)


def head_bytes(setup: Setup, shape: ModelShape) -> int:
    """Bytes of a chunk of logits, of four blocks in float32, and of the head's gradient.

    The gradient is there twice: summed in float32, and turned into the weights' precision.
    """
    chunk = HEAD_CHUNK_BYTES["cuda"] // 4 * setup.compute_bytes + 4 * HEAD_BLOCK_BYTES["cuda"]
    is_trained = setup.lora is None or "lm_head" in setup.lora.modules_to_save
    return chunk + is_trained * shape.embedding_parameters * (4 + setup.weight_bytes)


def _gathered(setup: Setup, shape: ModelShape, *, at_head: bool) -> list[Part]:
    """Sharded weights that are whole on each GPU for a while.

    In the layers these are two of them, one that computes and one that is on its way; at the head, embedding and
    head. FSDP keeps what is outside the layers, so there it is always both.
    """
    if not setup.traits.shards_weights:
        return []
    layers, ends = 2 * shape.layer_parameters, shape.end_parameters
    if not setup.traits.uses_deepspeed:
        count, what = layers + ends, "two layers, embedding and head"
    else:
        count, what = (ends, "embedding and head") if at_head else (layers, "two layers")
    return [Part("gathered weights", count * setup.weight_bytes, what)]


def _gradient_buffer(setup: Setup, shape: ModelShape) -> list[Part]:
    """Gradients that wait to be summed. A tensor that is larger than DeepSpeed's buffer is sent by itself."""
    traits = setup.traits
    if traits.for_one_process:
        return []
    if not traits.shards_gradients and not traits.uses_deepspeed:
        return [Part("gradient bucket", GRADIENT_BUCKET_BYTES)]
    trains_all = setup.lora is None
    if traits.zero_stage is None:
        largest = max(shape.layer_parameters, shape.end_parameters) * trains_all
        return [Part("gradient bucket", largest * setup.weight_bytes, "a layer's, or embedding's and head's")]
    largest = shape.embedding_parameters * trains_all
    beside = largest if largest > REDUCE_BUCKET_ELEMENTS else 0
    bucket_bytes = {
        1: 4,  # what is summed are float32 gradients
        2: 2 * setup.weight_bytes,  # one is filled while the other is sent
        3: setup.weight_bytes + 4 * (setup.weight_bytes == 2),  # what was summed is turned into float32
    }[traits.zero_stage]
    size = REDUCE_BUCKET_ELEMENTS * bucket_bytes + beside * setup.weight_bytes
    return [Part("gradient bucket", size, "DeepSpeed's, and the largest tensor" if beside else "DeepSpeed's")]


def step_parts(setup: Setup, trained: int) -> list[Part]:
    """What AdamW adds while it steps: roots of the second moments, and under DeepSpeed a copy of the gradient."""
    if setup.cpu_offload:
        return []
    own = trained / setup.state_share
    if not setup.traits.uses_deepspeed:
        return [Part("AdamW's own", own * optimizer_bytes(setup) / 2, "roots of the second moments")]
    if setup.traits.zero_stage == 3:
        own = min(own, SUB_GROUP_ELEMENTS)
    return [Part("AdamW's own", own * 8, "roots of the second moments, the gradient once more")]
