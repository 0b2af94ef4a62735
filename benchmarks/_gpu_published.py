"""The published part of `benchmarks.gpu`: forward, backward and optimizer on the shapes of others' figures.

A step is the training loop's own: the policy's log-probabilities, `policy_loss`, the strategy's backward and step.
Only its packs are made here: single causal sequences, every token of which is trained on, as in those runs.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks._gpu_arithmetic import (
    GIB,
    MICRO_BATCHES,
    PEAK_SHARE_BAR,
    PUBLISHED,
    Decoder,
    Published,
    peak_flops,
    training_flops,
)
from benchmarks._gpu_results import Finding, Part
from benchmarks._gpu_runs import Peaks, make_run, wait_for
from benchmarks._machine import device_name
from benchmarks._models import ModelSize
from benchmarks._report import Bar

WARM_UP, MEASURED = 2, 5
OWN_SHAPE = "qwen2.5-1.5b-8192"
"""Without recomputation, whose operations count nothing; no figure of others."""
REHEARSED = {
    "tiny": Published("random-qwen3-tiny", 256, False, 11_896, 12.53, 0.1108, 1.992),
    "tiny-lora": Published("random-qwen3-tiny", 256, True, 13_300, 5.1),
}


def recipe(row: int, lora: bool, recompute: bool, folder: str) -> dict[str, Any]:
    """With LoRA the frozen weights are bfloat16, otherwise all are float32 under autocast."""
    model: dict[str, Any] = {"gradient_checkpointing": recompute}
    if lora:
        model |= {"dtype": "bfloat16", "lora": {"r": 16}}
    return {
        "model": model,
        "generation": {"num_generations": 2, "max_completion_tokens": row},
        "train": {"output_dir": folder, "max_steps": 1, "prompts_per_step": 1, "max_tokens_per_microbatch": row},
    }


def sequences(run: Any, row: int, vocabulary: int) -> list[Any]:
    """Packs of one sequence of `row` tokens each, all but the first of which are a completion."""
    from grpo_cli.algorithm.packing import Group, pack_groups

    source = random.Random(0)
    tokens = [[source.randrange(vocabulary) for _ in range(row + 1)] for _ in range(MICRO_BATCHES)]
    groups = [Group(one[:1], [one[1:]], [index]) for index, one in enumerate(tokens)]
    packs = pack_groups(groups, row, shared_prompt=run.learner.policy.shares_prompts)
    assert [pack.input_ids.numel() for pack in packs] == [row] * MICRO_BATCHES
    return [run.learner.to_device(pack) for pack in packs]


def train_step(run: Any, packs: Sequence[Any]) -> None:
    from grpo_cli.algorithm.losses import policy_loss

    learner = run.learner
    learner.strategy.zero_grad()
    for index, pack in enumerate(packs):
        with learner.autocast():
            logprobs, entropies = learner.policy.token_logprobs(pack, 1.0)
        output = policy_loss(
            logprobs,
            logprobs.detach(),
            logprobs.new_full((1,), 1.0 if index % 2 else -1.0),  # an advantage for each completion
            pack.mask.float(),
            learner.recipe.loss,
            normalizer=float(sum(one.mask.numel() for one in packs)),
            entropies=entropies,
        )
        learner.strategy.backward(output.loss)
    learner.strategy.step()


def decoder_of(model: Any, lora: bool) -> Decoder:
    """Of the policy, adapters included."""
    config = model.config
    adapter = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) if lora else 0
    base = model.get_base_model() if lora else model
    size = ModelSize.of(base)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Decoder(size.body + size.head - adapter, config.num_hidden_layers, width, adapter)


def finding(
    piece: str, case: Published | None, card: str, decoder: Decoder, row: int, seconds: float, peaks: Peaks
) -> Finding:
    """The row of a piece, and verdicts against what is published."""
    rows = [row] * MICRO_BATCHES
    rate = sum(rows) / seconds
    flops = training_flops(decoder, rows) / seconds
    peak = peak_flops(card)
    share = None if peak is None else flops / peak
    allocated, reserved = (each["training"] / GIB for each in (peaks.allocated, peaks.reserved))
    cells = [piece, f"{seconds:.3f}", f"{rate:,.0f}", f"{flops / 1e12:.1f}"]
    cells += ["" if share is None else f"{share:.1%}", f"{allocated:.2f}", f"{reserved:.2f}"]
    if case is None:
        bars = [] if share is None else [Bar(f"{piece} share of peak", share, PEAK_SHARE_BAR)]
        return Finding([[*cells, "", "", ""]], bars)
    bars = [
        Bar(f"{piece} tokens per second", rate, case.tokens_per_second),
        Bar(f"{piece} GiB reserved", reserved, case.gib, at_most=True),
    ]
    if case.step_seconds is not None:
        theirs = MICRO_BATCHES * case.row / case.step_seconds
        bars.append(Bar(f"{piece} tokens per second of their steps alone", rate, round(theirs)))
    published = "" if case.peak_share is None else f"{case.peak_share:.1%}"
    return Finding([[*cells, f"{case.tokens_per_second:,.0f}", published, f"{case.gib:.2f}"]], bars)


def run(piece: str, device: str, rehearse: bool) -> Finding:
    case = (REHEARSED if rehearse else PUBLISHED).get(piece)
    model, row, lora = ("random-qwen2.5-1.5b", 8192, False) if case is None else (case.model, case.row, case.lora)
    with tempfile.TemporaryDirectory() as folder:
        sections = recipe(row, lora, case is not None, folder)
        built = make_run(model, device, sections, prompts=1, prompt=4)
    packs = sequences(built, row, built.learner.model.config.vocab_size)
    peaks, seconds = Peaks(device), []
    for step in range(WARM_UP + MEASURED):
        if step == WARM_UP:
            peaks.begin()
        wait_for(device)
        start = time.perf_counter()
        train_step(built, packs)
        wait_for(device)
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    peaks.end("training")
    # A rehearsal is judged as if it were a card, to see that it can be.
    card = device_name(device) if device == "cuda" else "NVIDIA H200"
    decoder = decoder_of(built.learner.model, lora)
    return finding(piece, case, card, decoder, row, statistics.median(seconds), peaks)


ABOUT = """
prime-rl's figures are of one H100: sequences of fake data, two a step, its model compiled, activations
recomputed; ours are the same sequences through the training loop's own step, float32 weights under bfloat16
autocast, with LoRA bfloat16 weights that are frozen. Tokens are all tokens of a step over its whole time,
optimizer included: medians of 5 steps after 2. FLOPs are 6 for each weight of a matrix product and token (LoRA:
4, and 6 for each of the adapter's), and 12 for each pair that attends and unit of heads times their size, half
of T² pairs in a sequence of T; what is recomputed is not counted. Memory is in GiB, of tensors
(`torch.cuda.max_memory_allocated`) and of torch's allocator (`max_memory_reserved`, which is what prime-rl
publishes, and what is judged). prime-rl's tokens per second include the pauses between its steps; where its
steps alone were faster, that is held against ours, too. The 1.5B shape has no recomputation.
"""

PART = Part(
    name="published",
    title="Published shapes",
    about=ABOUT,
    columns=("shape", "s a step", "tokens/s", "TFLOP/s", "of peak", "GiB", "GiB reserved",
             "theirs tokens/s", "theirs of peak", "theirs GiB"),
    limit_s=300,
    pieces=(*PUBLISHED, OWN_SHAPE),
    rehearsed=tuple(REHEARSED),
    run=run,
)  # fmt: skip
