from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.plan.memory import GIB, memory_plan
from grpo_cli.plan.setup import setup_of
from grpo_cli.plan.shape import PUBLISHED, ModelShape, ModelSize
from grpo_cli.plan.traffic import Work, sharing_bytes, traffic_rows, update_bytes, work_of
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import LoraConfig

ROOT = Path(__file__).parents[2]
RECIPE_72B = ROOT / "recipes" / "unique_chars_72b.yaml"
PARAMETERS = 72_706_203_648
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")

BIASED = PUBLISHED["Qwen/Qwen2.5-72B"].biased
QWEN = {
    "1.5B": PUBLISHED["Qwen/Qwen2.5-1.5B-Instruct"],
    "7B": ModelShape(3584, 28, 18944, 28, 4, 128, 152064, False, BIASED),
    "14B": ModelShape(5120, 48, 13824, 40, 8, 128, 152064, False, BIASED),
    "32B": ModelShape(5120, 64, 27648, 40, 8, 128, 152064, False, BIASED),
    "72B": PUBLISHED["Qwen/Qwen2.5-72B"],
}


def work(*overrides: str) -> Work:
    recipe = load_recipe(RECIPE_72B, overrides)
    return work_of(recipe, setup_of(recipe))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [  # one unit is what a ring of four moves of 100 bfloat16 parameters: 3/4 x 200 bytes
        ("none", 0),
        ("ddp", 2 * 2),
        ("zero1", 2 * 3),
        ("zero2", 5 * 2 + 2),
        ("zero3", 5 * 3),
        ("fsdp", 5 * 3),
    ],
)
def test_bytes_of_a_step_with_five_packs_and_two_optimizer_steps(strategy: Any, expected: float) -> None:
    setup = replace(setup_of(load_recipe(RECIPE_72B)), strategy=strategy, processes=4)
    assert sharing_bytes(setup, 100, 100, Work(tokens=1, packs=5, optimizer_steps=2)) == expected * 150


def test_an_adapter_sends_its_own_gradients_alone() -> None:
    setup = replace(setup_of(load_recipe(RECIPE_72B)), strategy="ddp", processes=4)
    assert sharing_bytes(setup, 100, 4, Work(tokens=1, packs=5, optimizer_steps=1)) == 2 * 0.75 * 8


@pytest.mark.parametrize("budget", [1000, 1536, 2048, 4096, 8192, 700])
@pytest.mark.parametrize("prompts", [32, 128, 160])
def test_packs_and_tokens_are_those_that_training_makes(budget: int, prompts: int) -> None:
    from grpo_cli.algorithm.packing import Group, deal_groups, pack_groups

    found = work(f"train.max_tokens_per_microbatch={budget}", f"train.prompts_per_step={prompts}")
    groups = [Group([0] * 512, [[0] * 128] * 8, list(range(8 * i, 8 * i + 8))) for i in range(prompts)]
    packs = [pack_groups(own, budget) for own in deal_groups(groups, 32)]
    assert found.packs == max(len(own) for own in packs)
    # a completion's last token is not an input: it is only predicted
    answers = -(-prompts // 32) * 8
    assert found.tokens == max(sum(pack.input_ids.numel() for pack in own) for own in packs) + answers


def test_several_optimizer_steps_share_out_a_rollouts_packs() -> None:
    assert work() == Work(tokens=6144, packs=1, optimizer_steps=1)
    assert work("train.optimizer_steps_per_rollout=4") == Work(tokens=6144, packs=4, optimizer_steps=4)
    assert work("train.num_iterations=2") == Work(tokens=12288, packs=2, optimizer_steps=2)


def test_one_process_without_a_server_sends_nothing() -> None:
    recipe = load_recipe(RECIPE_72B, ["generation={}", "distributed={}"])
    assert traffic_rows(recipe, setup_of(recipe), 100, 100) == []


def test_the_memory_table_of_scaling_md_is_what_check_says() -> None:
    base = replace(setup_of(load_recipe(RECIPE_72B)), pack_tokens=4096)
    one = replace(base, strategy="none", processes=1)
    rows = {
        "| none | 1 | float32": replace(one, weight_bytes=4),
        "| none, `lora` | 1 | bfloat16": replace(one, lora=LoraConfig()),
        "| zero2 | 8 | bfloat16": replace(base, strategy="zero2", processes=8),
        "| zero3 | 8 | bfloat16": replace(base, processes=8),
        "| zero3 | 32 | bfloat16": base,
        "| zero3 | 512 | bfloat16": replace(base, processes=512),
    }
    for head, setup in rows.items():
        peaks = [
            f"{memory_plan(setup, ModelSize(shape.parameters, shape, 'test')).peak / GIB:.1f}"
            for shape in QWEN.values()
        ]
        assert f"{head} | {' | '.join(peaks)} |" in SCALING


def test_the_figures_of_the_72b_run_in_scaling_md_add_up() -> None:
    recipe = load_recipe(RECIPE_72B)
    setup, step = setup_of(recipe), work()
    moved = sharing_bytes(setup, PARAMETERS, PARAMETERS, step)
    update = update_bytes(PARAMETERS)
    assert f"| {update / 1e9:.1f} GB | {update / 25e9:.1f} s | {update / 50e9:.1f} s |" in SCALING
    assert f"1 pack x {moved / 1e9:.1f} GB | {moved / 25e9:.1f} s | {moved / 50e9:.1f} s |" in SCALING
    compute = step.tokens * 8 * PARAMETERS / 400e12
    assert f"{step.tokens} tokens x 8 P / 400 TFLOP/s | {compute:.1f} s | {compute:.1f} s |" in SCALING
    generation = 128 * 8 * 128 / 5000
    assert f"131,072 tokens / 5000 | {generation:.1f} s |" in SCALING
    sums = [2 * update / speed + generation + max(moved / speed, compute) for speed in (25e9, 50e9)]
    assert f"| {sums[0]:.1f} s | {sums[1]:.1f} s |" in SCALING
    size = ModelSize(PARAMETERS, QWEN["72B"], "test")
    peak = memory_plan(setup, size).peak / GIB
    smaller = memory_plan(replace(setup, pack_tokens=4096), size).peak / GIB
    assert f"{peak:.1f} GiB of 80 are in use" in SCALING
    assert f"saves {peak - smaller:.0f} GiB and costs {moved / 25e9:.1f} s more" in SCALING
    assert work("train.max_tokens_per_microbatch=4096").packs == 2
    whole = memory_plan(replace(setup, gradient_checkpointing=False), size)
    (activations,) = (part.bytes for part in whole.phases["training"] if part.name == "activations")
    assert f"{activations / GIB:.0f} GiB for a pack of 8192" in SCALING
    offloaded = memory_plan(replace(setup, cpu_offload=True), size)
    assert f"{8 * offloaded.host / GIB:.0f} GiB of host memory on a node" in SCALING


def test_the_figures_of_64_nodes_in_scaling_md_add_up() -> None:
    recipe = load_recipe(RECIPE_72B, ["train.prompts_per_step=2048", "distributed.processes=512"])
    setup = setup_of(recipe)
    step = work_of(recipe, setup)
    assert step == work()
    moved = sharing_bytes(setup, PARAMETERS, PARAMETERS, step)
    assert (
        f"{step.tokens * 8 * PARAMETERS / 400e12:.1f} s of computing and {moved / 25e9:.1f} s of sharing"
        in SCALING
    )
    generation, update = 2048 * 8 * 128 / 5000, 2 * update_bytes(PARAMETERS) / 25e9
    assert (
        f"{generation:.0f} s on one server, and an update of\neach server takes {update:.1f} s at 25 GB/s"
        in SCALING
    )
    seconds = {servers: generation / servers + update * servers for servers in range(1, 65)}
    assert min(seconds, key=seconds.__getitem__) == 6
    assert f"at S = 6: {seconds[6]:.0f} s." in SCALING
    assert f"down to {generation / 16:.0f} s and the update takes {16 * update:.0f} s" in SCALING
    small = generation / 16  # of five nodes
    assert f"a second server gains {small / 2 - update:.1f} s" in SCALING
    plan = memory_plan(replace(setup, pack_tokens=32768), ModelSize(PARAMETERS, QWEN["72B"], "test"))
    assert plan.peak < 80 * GIB
