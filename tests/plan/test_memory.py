from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.errors import UserError
from grpo_cli.plan import fit, memory, shape
from grpo_cli.plan.fit import Gpu, check_fit, memory_rows
from grpo_cli.plan.memory import GIB, memory_plan
from grpo_cli.plan.setup import Setup, setup_of
from grpo_cli.plan.shape import PUBLISHED, ModelSize, shape_of
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import LoraConfig

ROOT = Path(__file__).parents[2]
RECIPE_72B = ROOT / "recipes" / "unique_chars_72b.yaml"
SIZE_72B = ModelSize(72_706_203_648, PUBLISHED["Qwen/Qwen2.5-72B"], "test")

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_model(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **(SMALL | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def written(config: Any) -> dict[str, Any]:
    """A configuration as its config.json has it."""
    values: dict[str, Any] = json.loads(config.to_json_string())
    return values


def setup_72b(**changes: Any) -> Setup:
    return replace(setup_of(load_recipe(RECIPE_72B)), **changes)


def sizes(setup: Setup, size: ModelSize = SIZE_72B) -> dict[str, float]:
    """GiB of what lasts, by name."""
    return {part.name: part.bytes / GIB for part in memory_plan(setup, size).lasting}


def phase(setup: Setup, name: str, size: ModelSize = SIZE_72B) -> dict[str, float]:
    return {part.name: part.bytes / GIB for part in memory_plan(setup, size).phases[name]}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("mistral", {"head_dim": 8}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_parameters_are_counted_from_the_configuration(kind: str, changes: dict[str, Any]) -> None:
    model = small_model(kind, **changes)
    found = shape_of(written(model.config))
    assert found is not None
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    (layer,) = {sum(p.numel() for p in layer.parameters()) for layer in model.model.layers}
    assert found.layer_parameters == layer


def test_published_shapes_have_the_published_number_of_parameters() -> None:
    counts = {name: found.parameters for name, found in PUBLISHED.items()}
    assert counts == {
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "Qwen/Qwen2-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
        "Qwen/Qwen2.5-72B": 72_706_203_648,
    }


def test_every_model_of_a_recipe_that_ships_has_a_plan_without_a_network() -> None:
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        name = load_recipe(path).model.name
        assert name in PUBLISHED or name.startswith("models/"), path


@pytest.mark.parametrize("config", [None, {}, {"model_type": "gpt2"}, {"model_type": "llama", "hidden_size": 8}])
def test_other_configurations_have_no_shape(config: dict[str, Any] | None) -> None:
    assert shape_of(config) is None


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "down_proj"], ["lm_head_is_not_one", "v_proj"]])
@pytest.mark.parametrize("saved", [[], ["lm_head"]])
def test_adapters_are_counted(modules: str | list[str], saved: list[str]) -> None:
    import peft

    lora = LoraConfig(r=4, target_modules=modules, modules_to_save=saved)
    model = small_model("llama")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules, modules_to_save=saved or None)
    )
    found = shape_of(written(model.config))
    assert found is not None
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert found.adapter_parameters(lora) == trained


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

    from grpo_cli.algorithm.packing import branches_of
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


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_what_a_rollout_casts_is_counted_from_the_configuration(kind: str, changes: dict[str, Any]) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    model = small_model(kind, **changes)
    sizes = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    cast: dict[int, int] = {}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in sizes:
                cast[args[0].data_ptr()] = sizes[args[0].data_ptr()]
            return func(*args, **(kwargs or {}))

    with Casts(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.tensor([[1, 2]]))
    found = shape_of(written(model.config))
    assert found is not None
    assert found.matrix_parameters == sum(cast.values())


def test_a_completion_that_does_not_fit_the_budget_makes_a_longer_pack() -> None:
    recipe = load_recipe(
        RECIPE_72B, ["generation.max_completion_tokens=20000", "train.max_tokens_per_microbatch=4096"]
    )
    assert setup_of(recipe).pack_tokens == 20512


@pytest.mark.parametrize(
    ("overrides", "gib", "advice"),
    [
        (["model.gradient_checkpointing=false"], 80, {"model.gradient_checkpointing": "true"}),
        ([], 64, {"train.max_tokens_per_microbatch": "4096"}),
        (["distributed.strategy=zero2"], 80, {"distributed.strategy": "zero3"}),
        (["distributed.processes=8"], 80, {"distributed.processes": "32"}),
        (["generation={}"], 80, {"generation.engine": "vllm_server"}),
        (["distributed.processes=504", "distributed.strategy=fsdp"], 14, {"model.lora": "{}"}),
    ],
)
def test_the_change_that_is_proposed_is_enough(overrides: list[str], gib: float, advice: dict[str, str]) -> None:
    recipe = load_recipe(RECIPE_72B, overrides)
    gpu = Gpu(gib, "test", True)
    changes, plan = next(fit.fits(setup_of(recipe), SIZE_72B, gpu))
    assert advice.items() <= changes.items()
    with pytest.raises(UserError) as caught:
        check_fit(setup_of(recipe), SIZE_72B, gpu)
    assert f"it takes {plan.peak / GIB:.1f} GiB" in str(caught.value)
    followed = [f"{key}={value}" for key, value in changes.items()]
    if "generation.engine" in changes:
        followed.append("generation.server={urls: [node5]}")
    if "distributed.cpu_offload" in changes:
        assert changes["distributed.cpu_offload"] == "true"
    again = setup_of(load_recipe(RECIPE_72B, [*overrides, *followed]))
    assert check_fit(again, SIZE_72B, gpu) is None


def test_what_nothing_helps_is_said() -> None:
    with pytest.raises(UserError, match="no setting makes it fit; take a smaller model"):
        check_fit(setup_72b(), SIZE_72B, Gpu(1, "test", True))


def test_an_assumed_gpu_is_no_reason_to_refuse() -> None:
    warning = check_fit(setup_72b(strategy="ddp"), SIZE_72B, Gpu(80, "assumed", False))
    assert warning is not None
    assert warning.startswith("on GPUs of 80 GiB it would not fit: it needs ")
    assert "with distributed.strategy zero3 it takes 67.3 GiB" in warning


def test_without_a_shape_the_plan_says_what_it_leaves_out() -> None:
    rows = dict(memory_rows(setup_72b(), ModelSize(GIB, None, "the safetensors files"), Gpu(80, "test", True)))
    assert "without activations" in rows["memory"]
    assert "in training" not in "".join(rows)


@pytest.mark.parametrize("strategy", ["none", "ddp", "zero2", "zero3", "fsdp"])
def test_loading_needs_the_model_once_on_a_node_however_many_share_it(strategy: Any) -> None:
    setup = setup_72b(strategy=strategy, processes=1 if strategy == "none" else 32)
    row = dict(memory_rows(setup, SIZE_72B, Gpu(80, "test", True)))["loading"]
    assert row == "135.4 GiB of the first node's 1024 GiB of CPU memory (assumed)"


def test_what_is_offloaded_is_beside_the_model_and_may_be_more_than_a_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "_host_memory", lambda: 500.0)
    setup, gpu = setup_72b(cpu_offload=True), Gpu(80, "test", True, is_here=True)
    row = dict(memory_rows(setup, SIZE_72B, gpu))["loading"]
    assert row.startswith(
        "507.8 GiB of the first node's 500 GiB of CPU memory (this machine's): more than there is"
    )
    assert "more" not in dict(memory_rows(replace(setup, cpu_offload=False), SIZE_72B, gpu))["loading"]


def test_the_smallest_gpu_of_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 24576\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert (fit.gpu_of(None).gib, fit.gpu_of(None).is_known) == (24, True)
    assert fit.gpu_of(40).gib == 40
    program.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    assert not fit.gpu_of(None).is_known


def grpo_check(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "300", "PATH": "/nowhere"}
    command = [sys.executable, "-m", "grpo_cli.cli", "check", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_check_prints_the_plan_of_the_72b_recipe_without_a_network() -> None:
    done = grpo_check("recipes/unique_chars_72b.yaml")
    assert done.returncode == 0, done.stderr
    assert "72,706,203,648, by the shape as published" in done.stdout
    assert "67.3 GiB on each of 32 GPUs (zero3) of 80 GiB (assumed" in done.stdout
    assert "25.4 GiB: float32 master and two moments: 12 bytes each, divided by 32" in done.stdout
    assert "145.4 GB of bfloat16 weights" in done.stdout
    assert "5.8 s at 25 GB/s" in done.stdout
    assert "would not fit" not in done.stdout
    assert done.stderr == ""


def test_check_refuses_a_plan_that_cannot_fit_the_given_gpu() -> None:
    done = grpo_check("recipes/unique_chars_72b.yaml", "--gpu-memory", "80", "--set", "distributed.strategy=zero2")
    assert done.returncode == 2
    assert "weights 135.4 GiB" in done.stderr
    assert "with distributed.strategy zero3 it takes 67.3 GiB" in done.stderr
    assert "the recipe is fine" not in done.stdout


def test_check_warns_without_refusing_where_no_gpu_is_known() -> None:
    done = grpo_check("recipes/unique_chars_72b.yaml", "--set", "distributed.strategy=zero2")
    assert done.returncode == 0
    assert "on GPUs of 80 GiB it would not fit" in done.stdout


def test_a_folder_with_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    config = SMALL | {"model_type": "qwen2", "hidden_size": 4096, "num_hidden_layers": 40}
    (tmp_path / "big" / "config.json").write_text(json.dumps(config))
    done = grpo_check("recipes/unique_chars_72b.yaml", "--set", f"model.name={tmp_path / 'big'}")
    assert done.returncode == 0, done.stderr
    found = shape_of(config)
    assert found is not None
    assert f"{found.parameters:,}, by config.json" in done.stdout


def test_a_model_that_nothing_is_known_of_is_no_error() -> None:
    done = grpo_check("recipes/unique_chars_72b.yaml", "--set", "model.name=nobody/nothing", "--gpu-memory", "8")
    assert done.returncode == 0, done.stderr
    assert "known once the model is loaded: its config.json is not on this machine" in done.stdout


def test_the_configuration_in_the_hub_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = tmp_path / "models--me--mine"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_recipe(RECIPE_72B, ["model.name=me/mine"]).model
    found = shape.model_size(model, Path("me/mine"))
    assert found.source == "config.json in the Hub's cache"
    assert found.shape == shape_of(SMALL | {"model_type": "llama"})
