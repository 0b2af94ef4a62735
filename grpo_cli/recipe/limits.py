"""How much the code takes at once, by kind of device: what the rooms above work with, and what `plan` adds up."""

from __future__ import annotations

import math

MICROBATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens of a forward pass where the recipe does not say: enough to keep the device busy."""

HEAD_CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits that the output head makes at a time."""

HEAD_BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
"""Float32 logits that softmax and its like work on at a time: on a CPU what the cache holds, ten times as fast."""

CACHE_TOKENS = 65_536
"""Tokens whose keys and values generation keeps at once; further groups wait until others are finished."""

MASK_BLOCK = 128
"""Tokens of a block of FlexAttention's mask, its default."""

SHORTEST_MASK = 512
"""FlexAttention sees rows of this many tokens times powers of two, so that it is compiled a few times only."""

GRADIENT_BUCKET_BYTES = 64 * 2**20
"""Gradients that `ddp` sums in one call."""


def automatic_microbatch_tokens(device_type: str, longest_prompt: int) -> int:
    """Tokens of a forward pass where the recipe does not say.

    A prompt fills half of them at most: a group that is split computes its prompt once for each part, and so less
    than twice the tokens that it would compute whole.
    """
    return max(MICROBATCH_TOKENS[device_type], 2 * longest_prompt)


def mask_length(tokens: int) -> int:
    """Tokens of the row that FlexAttention sees, for a row of `tokens`."""
    return SHORTEST_MASK * 2 ** max(0, math.ceil(math.log2(tokens / SHORTEST_MASK)))
