"""What a GPU's seconds and bytes are held against: counted operations, peaks, published figures. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30

PEAKS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}
"""Dense bfloat16 FLOPs per second by the makers' data sheets; the first name that is part of a card's counts."""


def peak_flops(card: str) -> float | None:
    """Of the card's name; None where it is not known, and then no share of it can be told."""
    return next((flops for name, flops in PEAKS.items() if name in card), None)


@dataclass(frozen=True)
class Decoder:
    """What counting operations needs to know of a decoder."""

    weights: int
    """Of all matrix products, the output head's too: a tied head counts, the embedding's look-up does not."""
    layers: int
    attention_width: int
    """Heads times their size."""
    adapter: int = 0
    """Weights of LoRA's matrices; 0 where all weights are trained."""


def training_flops(decoder: Decoder, rows: Sequence[int]) -> float:
    """Operations of forward and backward over causal rows of these lengths.

    Matrix products take 2 FLOPs for each weight and token forward, 2 for the gradient of their input and 2 for
    that of their weight, which a frozen weight has not. In each layer a row of T tokens has T²/2 pairs that
    attend: forward 4 FLOPs for each pair and unit of width, backward twice as many. What is computed a second time
    is not counted, nor norms, rotations and the softmax.
    """
    tokens = sum(rows)
    per_token = 4 * decoder.weights + 6 * decoder.adapter if decoder.adapter else 6 * decoder.weights
    pairs = sum(row * row for row in rows) / 2
    return per_token * tokens + 12 * decoder.layers * decoder.attention_width * pairs


@dataclass(frozen=True)
class Published:
    """A figure of prime-rl's trainer on one H100, as its repository publishes it, and what was computed for it."""

    model: str
    """A name of `_models.RANDOM_MODELS`."""
    row: int
    """Tokens of a sequence; a step has MICRO_BATCHES of them."""
    lora: bool
    tokens_per_second: float
    gib: float
    """Peak of memory reserved by torch's allocator."""
    peak_share: float | None = None
    step_seconds: float | None = None
    """Where its steps are faster than its tokens per second, in which the pauses between steps count, say."""


MICRO_BATCHES = 2
"""Sequences of a step in the published figures."""

PUBLISHED = {
    "qwen3-0.6b-16384": Published("random-qwen3-0.6b", 16_384, False, 11_896, 12.53, 0.1108, 1.992),
    "qwen3-0.6b-65536": Published("random-qwen3-0.6b", 65_536, False, 10_147, 19.56, 0.2680, 12.176),
    "qwen3-0.6b-16384-lora": Published("random-qwen3-0.6b", 16_384, True, 13_300, 5.1),
    "qwen3-4b-16384-lora": Published("random-qwen3-4b", 16_384, True, 6_200, 23.3),
}
"""With recomputation of activations; LoRA of rank 16."""

PEAK_SHARE_BAR = 0.45
"""Of the peak, in training the 1.5B shape."""
