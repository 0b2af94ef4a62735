from __future__ import annotations

import contextlib
from typing import Any

import pytest

from grpo_cli.plan import memory
from grpo_cli.plan.memory import GIB, memory_plan
from grpo_cli.plan.setup import Setup, setup_of
from grpo_cli.plan.shape import PUBLISHED, ModelSize, shape_of
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import LoraConfig
from tests.plan.models import RECIPE_72B, SIZE_72B, setup_72b, small_model, written


def sizes(setup: Setup, size: ModelSize = SIZE_72B) -> dict[str, float]:
    """GiB of what lasts, by name."""
    return {part.name: part.bytes / GIB for part in memory_plan(setup, size).lasting}


def phase(setup: Setup, name: str, size: ModelSize = SIZE_72B) -> dict[str, float]:
    return {part.name: part.bytes / GIB for part in memory_plan(setup, size).phases[name]}


def kept_bytes(kind: str, layers: int, dtype: Any, autocast: bool, checkpointing: bool, tokens: int) -> int:
    """What autograd keeps of a forward pass through the decoder, weights and their copies aside."""
    import torch

    model = small_model(kind, num_hidden_layers=layers, hidden_size=128, head_dim=32).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() == 2}
    shapes |= {columns[::-1] for columns in shapes}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    cast = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with cast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        assert output.last_hidden_state.requires_grad  # the graph is alive: no storage has been used twice
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("weights", "compute"), [(2, 2), (4, 4), (4, 2)])
def test_activations_of_a_layer_are_what_autograd_keeps(kind: str, weights: int, compute: int) -> None:
    import torch

    dtype, tokens = {2: torch.bfloat16, 4: torch.float32}[weights], 48
    for checkpointing in (False, True):
        kept = [kept_bytes(kind, count, dtype, weights != compute, checkpointing, tokens) for count in (2, 4)]
        model = small_model(kind, hidden_size=128, head_dim=32)
        found = shape_of(written(model.config))
        assert found is not None
        setup = setup_72b(weight_bytes=weights, compute_bytes=compute)
        expected = weights * found.hidden if checkpointing else memory.layer_activation_bytes(found, setup)
        assert (kept[1] - kept[0]) / 2 / tokens == expected


def test_deepspeeds_buffers_are_as_large_as_planned() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig()
    assert defaults.reduce_bucket_size == memory.REDUCE_BUCKET_ELEMENTS
    assert defaults.sub_group_size == memory.SUB_GROUP_ELEMENTS


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [  # bytes for each parameter of a bfloat16 model on four GPUs
        ("ddp", 2, 2, 4),
        ("fsdp", 2 / 4, 2 / 4, 4 / 4),
        ("zero1", 2, 4, 12 / 4),
        ("zero2", 2, 4 / 4, 12 / 4),
        ("zero3", 2 / 4, 4 / 4, 12 / 4),
    ],
)
def test_each_strategy_divides_its_share(
    strategy: Any, weights: float, gradients: float, optimizer: float
) -> None:
    size = ModelSize(GIB, None, "test")
    found = sizes(setup_72b(strategy=strategy, processes=4, has_reference=True), size)
    assert found.pop("CUDA, NCCL") == 2
    expected = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "reference": weights}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [("none", 4, 4, 8), ("zero1", 4, 4, 12), ("zero2", 4, 4, 12), ("zero3", 4, 4, 8), ("fsdp", 4, 4, 8)],
)
def test_float32_weights_are_their_own_masters(
    strategy: Any, weights: float, gradients: float, optimizer: float
) -> None:
    size = ModelSize(GIB, None, "test")
    found = sizes(setup_72b(strategy=strategy, processes=1, weight_bytes=4), size)
    assert (found["weights"], found["gradients"], found["optimizer"]) == (weights, gradients, optimizer)


def test_an_adapter_has_gradients_and_optimizer_but_the_model_has_not() -> None:
    found = sizes(setup_72b(strategy="none", processes=1, lora=LoraConfig()))
    trained = SIZE_72B.shape.adapter_parameters(LoraConfig())  # type: ignore[union-attr]
    assert found["weights"] == pytest.approx((2 * SIZE_72B.parameters + 4 * trained) / GIB)  # type: ignore[operator]
    assert found["gradients"] == pytest.approx(4 * trained / GIB)
    assert found["optimizer"] == pytest.approx(8 * trained / GIB)


@pytest.mark.parametrize(
    ("strategy", "on_gpu", "host"),
    [("zero1", 2 + 4, (12 + 4 + 2) / 4), ("zero2", 2, (12 + 4 + 2) / 4), ("zero3", 0, 22 / 4), ("fsdp", 0, 8 / 4)],
)
def test_offloading_moves_the_state_to_the_host(strategy: Any, on_gpu: float, host: float) -> None:
    plan = memory_plan(setup_72b(strategy=strategy, processes=4, cpu_offload=True), ModelSize(GIB, None, "test"))
    assert memory.total(plan.lasting) / GIB - 2 == pytest.approx(on_gpu)
    assert plan.host / GIB == pytest.approx(host)


def test_the_72b_recipe_by_hand() -> None:
    setup = setup_72b()
    assert (setup.strategy, setup.processes, setup.pack_tokens) == ("zero3", 32, 8192)
    found = sizes(setup)
    assert found["weights"] == pytest.approx(145.412 / 32 * 1e9 / GIB, rel=1e-4)
    assert found["gradients"] == pytest.approx(290.825 / 32 * 1e9 / GIB, rel=1e-4)
    assert found["optimizer"] == pytest.approx(872.474 / 32 * 1e9 / GIB, rel=1e-4)
    training = phase(setup, "training")
    assert training["activations"] == 8192 * 80 * 8192 * 2 / GIB == 10
    head = 152064 * 8192
    assert training["output head"] == pytest.approx((256 * 2**20 + 256 * 2**20 + 6 * head) / GIB)
    assert training["gathered weights"] == pytest.approx(2 * 2 * head / GIB)
    assert training["gradient bucket"] == pytest.approx((6 * 5e8 + 2 * head) / GIB)
    plan = memory_plan(setup, SIZE_72B)
    assert plan.busiest == "training"
    assert plan.peak / GIB == pytest.approx(67.3, abs=0.1)


def test_without_checkpointing_a_pack_of_the_72b_model_needs_hundreds_of_gibibytes() -> None:
    # each of 80 layers and 8192 tokens: 2 x (8 x 8192 + 4) + 2 x (2 x 8192 + 2 x 1024) + 4 x 64 + 8 x 29568 bytes
    found = phase(setup_72b(gradient_checkpointing=False), "training")
    assert found["activations"] * GIB == 8192 * 80 * (131_080 + 36_864 + 256 + 236_544)


def test_the_block_mask_of_a_long_pack_is_counted() -> None:
    import torch

    from grpo_cli.algorithm.branches import branches_of
    from grpo_cli.policy.block_mask import block_mask

    mask = block_mask(branches_of([2000], [[1500] * 20]), None)
    kept = sum(part.nbytes for part in mask.as_tuple() if isinstance(part, torch.Tensor))
    counted = phase(setup_72b(pack_tokens=32_000), "training")["block mask"] * GIB
    assert 256**2 * 4 * 4 <= kept <= counted == 256**2 * 24


def test_the_transformers_engine_gathers_a_sharded_model_on_every_gpu() -> None:
    for strategy, gathered in (("zero3", True), ("fsdp", True), ("zero2", False), ("ddp", False)):
        found = phase(setup_72b(strategy=strategy, engine="transformers"), "generation")
        assert ("gathered weights" in found) is gathered
    assert phase(setup_72b(), "generation") == {}


def test_zero1_holds_a_packs_gradients_beside_their_sum() -> None:
    bfloat16 = phase(setup_72b(strategy="zero1"), "training")
    assert bfloat16["the pack's gradients"] == pytest.approx(2 * 72_706_203_648 / GIB)
    assert "the pack's gradients" not in phase(setup_72b(strategy="zero1", weight_bytes=4), "training")
    assert "the pack's gradients" not in phase(setup_72b(strategy="zero2"), "training")


def test_autocast_keeps_a_second_set_of_float32_weights() -> None:
    found = phase(setup_72b(strategy="ddp", weight_bytes=4), "training")
    assert found["weights in bfloat16"] == pytest.approx(72_706_203_648 * 2 / GIB)


@pytest.mark.parametrize("strategy", ["none", "ddp", "zero2", "zero3", "fsdp"])
def test_a_rollout_holds_the_weights_that_it_has_cast(strategy: Any) -> None:
    lora = LoraConfig(r=4)
    for adapter in (None, lora):
        setup = setup_72b(strategy=strategy, engine="transformers", weight_bytes=4, lora=adapter)
        shape = PUBLISHED["Qwen/Qwen2.5-72B"]
        cast = shape.parameters - shape.embedding_parameters - (2 * shape.layers + 1) * shape.hidden
        cast += shape.adapter_parameters(lora) if adapter else 0
        assert phase(setup, "generation")["weights in bfloat16"] == pytest.approx(2 * cast / GIB)
    assert "weights in bfloat16" not in phase(setup_72b(engine="transformers"), "generation")


def test_a_rollout_draws_from_the_logits_of_all_its_rows() -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import LogitsProcessorList

    from grpo_cli.rollout.embedded.sampling import sample_tokens

    rows, vocabulary = 16, 4096
    arguments = (torch.rand(rows, dtype=torch.float64), 0.7, LogitsProcessorList(), torch.zeros(rows, 1))
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        sample_tokens(logits, *arguments)
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak == pytest.approx(memory.SAMPLING_BYTES * rows * vocabulary, rel=0.01)
    setup = setup_of(load_recipe(RECIPE_72B, ["generation={num_generations: 4, max_completion_tokens: 64}"]))
    assert setup.cached_rows == 4 * setup.cached_tokens // (512 + 4 * 64)
    expected = setup.cached_rows * 152_064 * (2 + memory.SAMPLING_BYTES) / GIB
    assert phase(setup, "generation")["sampling"] == pytest.approx(expected)


def test_a_completion_that_does_not_fit_the_budget_makes_a_longer_pack() -> None:
    recipe = load_recipe(
        RECIPE_72B, ["generation.max_completion_tokens=20000", "train.max_tokens_per_microbatch=4096"]
    )
    assert setup_of(recipe).pack_tokens == 20512
