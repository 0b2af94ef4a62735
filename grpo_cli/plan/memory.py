"""What a run needs of each GPU's memory, in bytes, by arithmetic: pure functions of a recipe and a model's shape.

What lasts is there all the time: weights, gradients, optimizer, reference. On top of it comes what the largest of
the three phases needs: generation, forward and backward of one pack, the optimizer's step. Counted are tensors, as
this code, torch and DeepSpeed 0.19 allocate them under the settings of `distributed.strategies`; gaps between them
are not, nor what a `deepspeed_config` of the user's changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_cli.distributed.environment import planned_strategy
from grpo_cli.plan.shape import ModelShape, ModelSize
from grpo_cli.recipe.schema import LoraConfig, Recipe
from grpo_cli.recipe.strategies import STRATEGIES, StrategyName, StrategyTraits

GIB = 2**30
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}

AUTOMATIC_MICROBATCH_TOKENS = 4096
HEAD_CHUNK_BYTES = 512 * 2**20
HEAD_BLOCK_BYTES = 64 * 2**20
CACHE_TOKENS = 65_536
"""As in `train.run`, `policy.output_head` and `rollout.memory`, for a GPU. Those modules need torch."""

MASK_BLOCK = 128
SMALLEST_MASK = 512
"""As in `policy.block_mask`: tokens of a block, and of the shortest of the rows that others are padded to."""

DDP_BUCKET_BYTES = 64 * 2**20
"""Gradients that are summed in one call under `ddp`."""

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's buffer for gradients on their way to their owners."""

SUB_GROUP_ELEMENTS = 1_000_000_000
"""Parameters that DeepSpeed's ZeRO-3 optimizer updates at a time."""

CUDA_BYTES = 2 * GIB
"""CUDA's context, its libraries' workspaces and NCCL's buffers: an estimate."""

ASSUMED_PROMPT_TOKENS = 512
"""Longest prompt where `data.max_prompt_tokens` does not say."""

SAMPLING_BYTES = 16
"""Of a logit while a token is drawn: itself in float32, its exponential twice, the second time in float64."""

SERVER_BYTES = 2
"""Of a weight in a rollout server: bfloat16."""


@dataclass(frozen=True)
class Setup:
    """The settings that memory depends on."""

    strategy: StrategyName
    processes: int
    weight_bytes: int
    """Of one trained weight."""
    compute_bytes: int
    """Of one value in forward and backward passes."""
    gradient_checkpointing: bool
    cpu_offload: bool
    pack_tokens: int
    """Tokens in one forward pass."""
    shortest_pack: int
    """A completion is never split: no forward pass can be promised to be smaller."""
    cached_tokens: int
    """Tokens whose keys and values the transformers engine keeps at once."""
    cached_rows: int
    """Completions that it generates at once."""
    engine: str
    lora: LoraConfig | None
    has_reference: bool

    @property
    def traits(self) -> StrategyTraits:
        return STRATEGIES[self.strategy]

    @property
    def has_autocast(self) -> bool:
        return self.compute_bytes != self.weight_bytes


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
        return total(self.lasting) + total(self.phases[self.busiest])


def total(parts: Sequence[Part]) -> float:
    """Bytes of all parts."""
    return sum(part.bytes for part in parts)


def prompt_tokens(recipe: Recipe) -> int:
    """Of the longest prompt, as far as the recipe says."""
    return recipe.data.max_prompt_tokens or ASSUMED_PROMPT_TOKENS


def setup_of(recipe: Recipe) -> Setup:
    """The recipe's settings as they will be on a GPU that has bfloat16.

    Raises:
        UserError: the strategy cannot be told, such as by a DeepSpeed file that is not there.
    """
    model, generation, train = recipe.model, recipe.generation, recipe.train
    processes = recipe.distributed.processes or 1
    weight_bytes = BYTES_PER_VALUE[model.dtype]
    prompt = prompt_tokens(recipe)
    longest = prompt + generation.max_completion_tokens
    group = prompt + generation.num_generations * generation.max_completion_tokens
    own_groups = math.ceil(train.prompts_per_step / processes)
    cached_groups = min(own_groups, max(1, CACHE_TOKENS // group))
    return Setup(
        strategy=planned_strategy(recipe.distributed, processes),
        processes=processes,
        weight_bytes=weight_bytes,
        compute_bytes=2 if model.compute_dtype == "auto" else BYTES_PER_VALUE[model.compute_dtype],
        gradient_checkpointing=model.gradient_checkpointing,
        cpu_offload=recipe.distributed.cpu_offload,
        pack_tokens=max(train.max_tokens_per_microbatch or max(AUTOMATIC_MICROBATCH_TOKENS, 2 * prompt), longest),
        shortest_pack=longest,
        cached_tokens=cached_groups * group,
        cached_rows=cached_groups * generation.num_generations,
        engine=generation.engine,
        lora=model.lora,
        has_reference=recipe.loss.beta > 0 and (model.reference is not None or model.lora is None),
    )


def memory_plan(setup: Setup, size: ModelSize) -> MemoryPlan:
    """Add up a run's memory. Without a shape, what depends on it (activations, caches) is left out."""
    assert size.parameters is not None
    lasting, host = lasting_parts(setup, size.parameters, size.shape)
    trained = trained_parameters(setup, size.parameters, size.shape)
    phases: dict[str, Sequence[Part]] = {
        "generation": generation_parts(setup, size.parameters, size.shape),
        "training": training_parts(setup, size.parameters, size.shape),
        "optimizer step": step_parts(setup, trained),
    }
    return MemoryPlan(lasting, phases, host)


def trained_parameters(setup: Setup, parameters: int, shape: ModelShape | None) -> int:
    """All of them, or those of the adapter (0 where the shape is not known: they are few)."""
    if setup.lora is None:
        return parameters
    return 0 if shape is None else shape.adapter_parameters(setup.lora)


def optimizer_bytes(setup: Setup) -> int:
    """Of AdamW, for one trained parameter: two moments, and DeepSpeed's float32 master weight.

    DeepSpeed's stages 1 and 2 keep a master beside float32 weights, too; stage 3 only where it is offloaded.
    Without DeepSpeed there is none, and the moments have the weights' precision.
    """
    if not setup.traits.uses_deepspeed:
        return 2 * (4 if setup.lora else setup.weight_bytes)
    is_own_master = setup.traits.shards_weights and setup.weight_bytes == 4 and not setup.cpu_offload
    return 8 if is_own_master else 12


def lasting_parts(setup: Setup, parameters: int, shape: ModelShape | None) -> tuple[list[Part], float]:
    """What is there all the time on each GPU, and bytes in host memory for each process."""
    trained = trained_parameters(setup, parameters, shape)
    share, traits = setup.processes, setup.traits
    weight_share = share if traits.shards_weights else 1
    gradient_share = share if traits.shards_gradients else 1
    state_share = share if traits.shards_optimizer else 1
    trained_bytes = 4 if setup.lora and not traits.uses_deepspeed else setup.weight_bytes
    gradient_bytes = 4 if traits.uses_deepspeed else trained_bytes
    frozen = parameters if setup.lora else 0
    weights = (frozen * setup.weight_bytes + trained * trained_bytes) / weight_share
    gradients = trained * gradient_bytes / gradient_share
    optimizer = trained * optimizer_bytes(setup) / state_share
    reference = parameters * setup.weight_bytes / weight_share if setup.has_reference else 0.0
    host = 0.0
    if setup.cpu_offload:
        host, optimizer = optimizer, 0.0
        if traits.uses_deepspeed:  # a float32 gradient, and in stages 1 and 2 a buffer for the updated weights
            host += trained * (4 + (0 if traits.shards_weights else setup.weight_bytes)) / state_share
        if traits.shards_weights:
            host += weights + gradients + reference
            weights = reference = 0.0
        if traits.shards_gradients:
            gradients = 0.0
    where = "in host memory" if setup.cpu_offload else ""
    master = "float32 master and " if optimizer_bytes(setup) == 12 else ""

    def divided(by: int) -> str:
        return f", divided by {by}" if by > 1 else ""

    return [
        Part("weights", weights, f"{parameters:,} x {setup.weight_bytes} bytes{divided(weight_share)}"),
        Part("gradients", gradients, f"{trained:,} x {gradient_bytes} bytes{divided(gradient_share)}"),
        Part(
            "optimizer",
            optimizer,
            where or f"{master}two moments: {optimizer_bytes(setup)} bytes each{divided(state_share)}",
        ),
        Part("reference", reference, f"a second model{divided(weight_share)}"),
        Part("CUDA, NCCL", CUDA_BYTES, "an estimate"),
    ], host


def generation_parts(setup: Setup, parameters: int, shape: ModelShape | None) -> list[Part]:
    """What a rollout adds on a training GPU; nothing where a server makes it."""
    parts = []
    if setup.engine == "vllm":
        parts.append(Part("vLLM's weights", parameters * SERVER_BYTES, "and its cache, from what is left"))
    if setup.engine == "transformers":
        if setup.traits.shards_weights:
            parts.append(Part("gathered weights", parameters * setup.weight_bytes, "the whole model on every GPU"))
        if setup.has_autocast:
            cast = parameters if shape is None else shape.matrix_parameters
            cast += trained_parameters(setup, parameters, shape) if setup.lora else 0
            parts.append(Part("weights in bfloat16", cast * setup.compute_bytes, "cast once for the rollout"))
        if shape is not None:
            cache = setup.cached_tokens * 2 * shape.layers * shape.kv_width * setup.compute_bytes
            parts.append(Part("keys and values", cache, f"{setup.cached_tokens} tokens"))
            drawn_from = setup.cached_rows * shape.vocabulary * (setup.compute_bytes + SAMPLING_BYTES)
            parts.append(Part("sampling", drawn_from, f"logits of {setup.cached_rows} tokens, summed in float64"))
    return parts


def layer_activation_bytes(shape: ModelShape, setup: Setup) -> int:
    """What one layer keeps of one token for its backward pass.

    With h, q, k, i the widths of residual, queries, keys and MLP, and c bytes a value: each of two norms keeps its
    input in float32 and its output before and after its weight, (4 + 2c) h + 4. Attention keeps queries, keys,
    values, output, c (2q + 2k), and a float32 sum per head; no scores. The gated MLP keeps 4 c i. Under autocast
    norms are in float32, and each projection keeps its own bfloat16 copy of its input.
    """
    c, h = setup.compute_bytes, shape.hidden
    norms = 2 * (8 * h + 4) + 5 * c * h if setup.has_autocast else 2 * ((4 + 2 * c) * h + 4)
    attention = c * (2 * shape.query_width + 2 * shape.kv_width) + 4 * shape.heads
    if shape.norms_heads:
        attention += (4 + c) * (shape.query_width + shape.kv_width) + 4 * (shape.heads + shape.kv_heads)
    return norms + attention + 4 * c * shape.intermediate


def training_parts(setup: Setup, parameters: int, shape: ModelShape | None) -> list[Part]:
    """What forward and backward of one pack add: what is kept of each layer, and the fuller of two moments.

    One is in the middle of a layer's backward pass, the other at the output head.
    """
    parts = []
    if setup.has_autocast and setup.traits.zero_stage != 3:
        parts.append(Part("weights in bfloat16", parameters * setup.compute_bytes, "kept by autocast"))
    if setup.traits.zero_stage == 1 and setup.weight_bytes == 2:
        trained = trained_parameters(setup, parameters, shape)
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
    in_layer = [
        Part("one layer's backward", tokens * (again + flowing), "recomputed values and gradients"),
        *_gathered(setup, shape, at_head=False),
        *_gradient_buffer(setup, shape),
    ]
    at_head = [Part("output head", head_bytes(setup, shape), "a chunk of logits, the head's gradient in float32")]
    at_head += _gathered(setup, shape, at_head=True)
    at_head += _gradient_buffer(setup, shape)
    return parts + max(in_layer, at_head, key=total)


def block_mask_bytes(tokens: int) -> int:
    """Four orders of the blocks of a row, in 4 bytes an entry, and one in 8 while it is sorted."""
    length = SMALLEST_MASK * 2 ** max(0, math.ceil(math.log2(tokens / SMALLEST_MASK)))
    return (length // MASK_BLOCK) ** 2 * (4 * 4 + 8)


def head_bytes(setup: Setup, shape: ModelShape) -> int:
    """A chunk of logits, four blocks in float32, and the head's gradient: in float32, then as the weights."""
    chunk = HEAD_CHUNK_BYTES // 4 * setup.compute_bytes + 4 * HEAD_BLOCK_BYTES
    is_trained = setup.lora is None or "lm_head" in setup.lora.modules_to_save
    return chunk + is_trained * shape.embedding_parameters * (4 + setup.weight_bytes)


def _gathered(setup: Setup, shape: ModelShape, *, at_head: bool) -> list[Part]:
    """Weights that are whole for a while: two layers, one computed and one on its way; or embedding and head.

    FSDP keeps what is outside the layers, so there they add up.
    """
    if not setup.traits.shards_weights:
        return []
    layers = 2 * shape.layer_parameters
    ends = (2 - shape.tied) * shape.embedding_parameters
    if not setup.traits.uses_deepspeed:
        return [Part("gathered weights", (layers + ends) * setup.weight_bytes, "two layers, embedding and head")]
    if at_head:
        return [Part("gathered weights", ends * setup.weight_bytes, "embedding and head")]
    return [Part("gathered weights", layers * setup.weight_bytes, "two layers")]


def _gradient_buffer(setup: Setup, shape: ModelShape) -> list[Part]:
    """Gradients that wait to be summed. A tensor that is larger than DeepSpeed's buffer is sent by itself."""
    traits = setup.traits
    if traits.for_one_process:
        return []
    if not traits.shards_gradients and not traits.uses_deepspeed:
        return [Part("gradient bucket", DDP_BUCKET_BYTES)]
    trains_all = setup.lora is None
    if traits.zero_stage is None:
        ends = (2 - shape.tied) * shape.embedding_parameters
        largest = max(shape.layer_parameters, ends) * trains_all
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
    """What AdamW adds while it steps: a root of each second moment, and under DeepSpeed a copy of the gradient."""
    if setup.cpu_offload:
        return []
    own = trained / (setup.processes if setup.traits.shards_optimizer else 1)
    if not setup.traits.uses_deepspeed:
        return [Part("AdamW's own", own * optimizer_bytes(setup) / 2, "roots of the second moments")]
    if setup.traits.zero_stage == 3:
        own = min(own, SUB_GROUP_ELEMENTS)
    return [Part("AdamW's own", own * 8, "roots of the second moments, the gradient once more")]
