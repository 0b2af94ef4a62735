from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest

from grpo_cli.recipe import contradictions as module
from grpo_cli.recipe.contradictions import contradictions
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.raw import RecipeError
from grpo_cli.recipe.schema import Recipe

PLAIN: dict[str, Any] = {
    "model": {"name": "m"},
    "data": {"name": "d"},
    "rewards": ["my:score"],
    "train": {"output_dir": "run", "max_steps": 1},
}

LORA = {"modules_to_save": ["lm_head"]}

CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"model": {"reference": "r"}}, "model.reference", "set loss.beta, or remove model.reference"),
    ({"model": {"lora": LORA}, "loss": {"beta": 0.1}}, "model.lora.modules_to_save", "needs model.reference"),
    ({"model": {"dtype": "bfloat16", "compute_dtype": "float32"}}, "model.compute_dtype", "write dtype: float32"),
    ({"data": {"name": "rows.csv", "split": "test"}}, "data.split", "is a file and has no splits; remove it"),
    ({"data": {"name": ""}}, "data.name", "is missing"),
    (
        {"data": {"name": ""}, "episode": {"environment": {"a": "my:A", "b": "my:B"}}},
        "data.name",
        "each row's column environment says which",
    ),
    (
        {"data": {"name": ""}, "episode": {"environment": "my:A"}, "train": {"max_steps": None, "epochs": 1.0}},
        "train.epochs",
        "write train.max_steps instead",
    ),
    (
        {"data": {"name": "", "limit": 3}, "episode": {"environment": "my:A"}},
        "data.limit",
        "does nothing without data.name; set it too, or remove it",
    ),
    ({"episode": {}}, "episode", "has neither tools nor an environment"),
    ({"episode": {"max_turns": 3}}, "episode", "has neither tools nor an environment"),
    ({"episode": {"environment": {}}}, "episode.environment", "names none"),
    ({"episode": {"tools": ["a:b", "a:b"]}}, "episode.tools", "names a:b twice"),
    ({"rewards": []}, "rewards", "is missing or empty"),
    ({"rewards": [], "episode": {"tools": ["a:b"]}}, "rewards", "is missing or empty"),
    ({"model": {"name": "m.gguf", "gguf_file": "n.gguf"}}, "model.gguf_file", "keep one of them"),
    ({"generation": {"server": {"spawn": True}}}, "generation.server", "remove it, or change the engine"),
    ({"generation": {"engine": "vllm_server"}}, "generation.server", "needs exactly one of urls"),
    (
        {"generation": {"engine": "vllm_server", "server": {"spawn": True, "urls": ["a"]}}},
        "generation.server",
        "needs exactly one of urls",
    ),
    (
        {"generation": {"engine": "vllm_server", "server": {"urls": ["a"], "port": 8001}}},
        "generation.server.port",
        "is for spawn: true",
    ),
    (
        {"generation": {"engine": "vllm_server", "server": {"urls": ["a", "http://a:8000/"]}}},
        "generation.server.urls",
        "names a server twice",
    ),
    (
        {"generation": {"engine": "vllm_server", "server": {"spawn": True, "api_key_file": "k"}}},
        "generation.server.api_key_file",
        "a spawned server has a key of its own",
    ),
    ({"generation": {"vllm": {"max_model_len": 9}}}, "generation.vllm", "has no server or engine to go to"),
    ({"generation": {"replay": "runs/x"}}, "generation.replay", "is for engine: replay"),
    ({"generation": {"engine": "replay"}}, "generation.replay", "is missing"),
    (
        {"generation": {"engine": "replay", "replay": "runs/x"}, "data": {"eval": {"name": "e.jsonl"}}},
        "data.eval",
        "generates nothing",
    ),
    (
        {"generation": {"engine": "vllm", "vllm": {"model": "m"}}},
        "generation.vllm.model",
        "has a key of its own: model.name",
    ),
    ({"rewards": [{}]}, "rewards.0", "needs exactly one of path (module:function) and model"),
    ({"rewards": ["a:b", {"path": "a:c", "model": "m"}]}, "rewards.1", "needs exactly one of path"),
    ({"rewards": ["a:b", "c:b"]}, "rewards.1.name", "as for rewards.0; give one of them another name"),
    ({"rewards": ["a:b", {"model": "x/b"}]}, "rewards.1.name", "give one of them another name"),
    (
        {"rewards": [{"model": "m", "workers": 1}]},
        "rewards.0.workers",
        "needs the device that generates; remove it",
    ),
    (
        {"rewards": [{"model": "m", "isolate": True}]},
        "rewards.0.isolate",
        "needs the device that generates; remove it",
    ),
    ({"rewards": [{"path": "a:b", "weight": 0}]}, "rewards", "every weight is 0"),
    ({"loss": {"type": "sapo", "epsilon": 0.1}}, "loss.epsilon", "is not used by type sapo; remove it"),
    ({"loss": {"type": "cispo", "epsilon": 0.1}}, "loss.epsilon", "is not used by type cispo; remove it"),
    ({"loss": {"type": "vespo", "epsilon_high": 0.1}}, "loss.epsilon_high", "is not used by type vespo"),
    ({"loss": {"type": "cispo", "delta": 2.0}}, "loss.delta", "is not used by type cispo"),
    (
        {"loss": {"sapo_temperature_pos": 2.0}},
        "loss.sapo_temperature_pos",
        "is used only by type sapo (type is dapo)",
    ),
    ({"loss": {"vespo_k_neg": 2.0}}, "loss.vespo_k_neg", "is used only by type vespo"),
    ({"loss": {"type": "vespo", "importance_level": "sequence"}}, "loss.importance_level", "remove it"),
    ({"loss": {"delta": 1.2}}, "loss.delta", "must lie above 1 + epsilon_high = 1.2; raise it or remove it"),
    ({"loss": {"delta": 1.25, "epsilon_high": 0.28}}, "loss.delta", "must lie above 1 + epsilon_high = 1.28"),
    (
        {"loss": {"aggregation": "normalize_then_sum", "scale_rewards": "none"}},
        "loss.scale_rewards",
        "remove scale_rewards",
    ),
    (
        {"loss": {"aggregation": "normalize_then_sum", "drop_zero_variance_groups": "resample"}},
        "loss.drop_zero_variance_groups",
        "remove one of them",
    ),
    (
        {"loss": {"type": "my:loss", "top_entropy_quantile": 0.5}},
        "loss.top_entropy_quantile",
        "my:loss sees a micro-batch of it; remove it",
    ),
    ({"loss": {"bias_corrected_kl": True}}, "loss.bias_corrected_kl", "needs loss.beta above 0"),
    (
        {"loss": {"type": "vespo", "sampler_correction": {"mode": "sequence_mask"}}},
        "loss.sampler_correction.mode",
        "write token_mask",
    ),
    (
        {"loss": {"sampler_correction": {"mode": "token_mask", "clip_max": None}}},
        "loss.sampler_correction.clip_max",
        "nothing bounds the weights; write 3.0",
    ),
    (
        {"loss": {"sampler_correction": {"clip_min": 2.0, "clip_max": 1.5}}},
        "loss.sampler_correction.clip_min",
        "must lie below clip_max = 1.5; lower it, or raise clip_max",
    ),
    ({"loss": {"sampler_correction": {"clip_max": 0.2}}}, "loss.sampler_correction", "weights to 0..0.2, but"),
    (
        {"loss": {"sampler_correction": {}}, "generation": {"engine": "vllm", "top_p": 0.9}},
        "generation.top_p",
        "remove top_p, or loss.sampler_correction",
    ),
    (
        {"loss": {"sampler_correction": {"clip_min": 1.5, "clip_max": None}}},
        "loss.sampler_correction",
        "bounds weights to 1.5..inf, but where nothing is to correct they are 1; include it",
    ),
    ({"loss": {"kl_estimator": "k1"}}, "loss.kl_estimator", "set loss.beta, or remove it"),
    ({"optim": {"params": {"a": 1}}}, "optim.params", "is for a factory; adamw takes betas and weight_decay"),
    ({"optim": {"name": "sgd"}}, "optim.name", "must be adamw or module:factory, not 'sgd'"),
    ({"optim": {"name": "a:b", "betas": [0.9, 0.95]}}, "optim.betas", "write it into optim.params for a:b"),
    ({"optim": {"name": "a:b", "weight_decay": 0.1}}, "optim.weight_decay", "write it into optim.params"),
    ({"optim": {"scheduler": "constant", "warmup_ratio": 0.1}}, "optim.scheduler", "write constant_with_warmup"),
    ({"optim": {"scheduler": "constant_with_warmup"}}, "optim.warmup_ratio", "or write scheduler: constant"),
    ({"train": {"max_steps": None}}, "train.max_steps", "is missing; set it, or train.epochs"),
    ({"train": {"epochs": 1.0}}, "train.max_steps", "so does train.epochs; remove one of them"),
    ({"train": {"optimizer_steps_per_rollout": 9}}, "train.optimizer_steps_per_rollout", "lower it or raise"),
    ({"train": {"eval_every": 5}}, "train.eval_every", "needs data.eval; add it, or remove train.eval_every"),
    ({"data": {"long_prompts": "error"}}, "data.long_prompts", "without data.max_prompt_tokens; set it too"),
    (
        {"data": {"max_prompt_tokens": 9, "long_prompts": "error"}, "episode": {"environment": "my:A"}},
        "data.long_prompts",
        "must be drop with an environment",
    ),
    (
        {"data": {"eval": {"name": "e", "long_prompts": "truncate_left"}}},
        "data.eval.long_prompts",
        "without data.eval.max_prompt_tokens",
    ),
    (
        {"distributed": {"strategy": "none", "processes": 2}},
        "distributed.strategy",
        "none is for one process (processes is 2); write auto, or processes: 1",
    ),
    (
        {"distributed": {"strategy": "fsdp", "deepspeed_config": "ds.json"}},
        "distributed.deepspeed_config",
        "is for zero1, zero2 and zero3 (strategy is fsdp); remove it",
    ),
    (
        {"distributed": {"strategy": "zero3", "deepspeed_config": "ds.json", "cpu_offload": True}},
        "distributed.cpu_offload",
        "is set in deepspeed_config; remove it here",
    ),
    (
        {"distributed": {"strategy": "ddp", "cpu_offload": True}},
        "distributed.cpu_offload",
        "needs zero1, zero2, zero3 or fsdp (strategy is ddp); set strategy",
    ),
    (
        {"generation": {"engine": "vllm"}, "distributed": {"processes": 2}},
        "generation.engine",
        "vllm is for one process (distributed.processes is 2); write vllm_server",
    ),
]

FINE: list[dict[str, Any]] = [
    {},
    {"model": {"reference": "r"}, "loss": {"beta": 0.1}},
    {"model": {"lora": LORA}},
    {"model": {"lora": LORA, "reference": "r"}, "loss": {"beta": 0.1}},
    {"model": {"lora": {}}, "loss": {"beta": 0.1}},
    {"model": {"name": "folder", "gguf_file": "n.gguf"}},
    {"rewards": ["a:b", {"path": "c:b", "name": "other"}, {"model": "x/judge", "weight": 0}]},
    {"rewards": [{"path": "a:b", "weight": -1}]},
    {"rewards": [{"path": "a:b", "workers": 4}, {"model": "m", "workers": 0}]},
    {"loss": {"type": "cispo", "epsilon_high": 3.0}},
    {"loss": {"type": "sapo", "sapo_temperature_pos": 2.0}},
    {"loss": {"type": "vespo", "vespo_k_neg": 2.0}},
    {"loss": {"type": "cispo", "epsilon": 0.2}},
    {"loss": {"delta": 1.21}},
    {"loss": {"type": "my:loss", "delta": 0.5, "epsilon": 0.1, "sapo_temperature_pos": 2.0, "vespo_k_neg": 2.0}},
    {"loss": {"type": "my:loss", "kl_estimator": "k1", "importance_level": "sequence"}},
    {"loss": {"type": "my:loss", "sampler_correction": {"mode": "sequence_mask"}}},
    {"loss": {"aggregation": "normalize_then_sum"}},
    {"loss": {"aggregation": "normalize_then_sum", "drop_zero_variance_groups": False}},
    {"loss": {"drop_zero_variance_groups": "resample", "scale_rewards": "batch", "beta": 0.1}},
    {"loss": {"aggregation": "normalize_then_sum", "scale_rewards": "group"}},
    {"loss": {"beta": 0.1, "kl_estimator": "k1", "bias_corrected_kl": True}},
    {"loss": {"sampler_correction": {}}, "generation": {"top_p": 0.9, "top_k": 5}},
    {"loss": {"off_policy_threshold": 0.5}, "generation": {"min_p": 0.1, "repetition_penalty": 1.1}},
    {"loss": {"type": "vespo", "sampler_correction": {"mode": "token_mask", "clip_min": 0.5}}},
    {"loss": {"sampler_correction": {"mode": "sequence_truncate", "clip_min": 0.5, "clip_max": None}}},
    {"optim": {"name": "a:b", "params": {"x": 1}}},
    {"optim": {"name": "a:b", "betas": [0.9, 0.999]}},
    {"optim": {"scheduler": "constant_with_warmup", "warmup_ratio": 0.1}},
    {"train": {"max_steps": None, "epochs": 1.0}},
    {"train": {"optimizer_steps_per_rollout": 8}},
    {"train": {"eval_every": 5}, "data": {"eval": {"name": "e"}}},
    {"data": {"max_prompt_tokens": 9, "long_prompts": "error"}},
    {"distributed": {"strategy": "none", "processes": 1}},
    {"episode": {"tools": ["a:b", "a:c"]}},
    {"episode": {"environment": "my:A"}, "data": {"name": "", "system_prompt": "x"}, "rewards": []},
    {"episode": {"environment": {"a": "my:A"}}, "rewards": [{"path": "a:b", "weight": 0}]},
    {"distributed": {"strategy": "ddp", "processes": 2}},
    {"distributed": {"strategy": "auto", "deepspeed_config": "ds.json"}},
    {"distributed": {"strategy": "zero2", "deepspeed_config": "ds.json"}},
    {"distributed": {"strategy": "fsdp", "cpu_offload": True}},
    {"distributed": {"strategy": "zero1", "cpu_offload": True}},
    {"distributed": {"processes": 1}, "generation": {"engine": "vllm"}},
    {"distributed": {"processes": 2}, "generation": {"engine": "vllm_server", "server": {"urls": ["a"]}}},
]


def with_changes(changes: dict[str, Any]) -> dict[str, Any]:
    merged = PLAIN | changes
    for section in ("model", "data", "train"):
        merged[section] = PLAIN[section] | changes.get(section, {})
    return merged


@pytest.mark.parametrize(
    ("changes", "key", "advice"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_contradiction_is_found_once_and_says_what_to_write(
    changes: dict[str, Any], key: str, advice: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(with_changes(changes))
    message = str(caught.value)
    assert message.startswith(f"recipe: {key} ")
    assert advice in message
    assert "\n" not in message


@pytest.mark.parametrize("changes", FINE, ids=str)
def test_settings_that_fit_together_are_left_alone(changes: dict[str, Any]) -> None:
    assert list(contradictions(load_recipe(with_changes(changes)))) == []


FILTERED: dict[str, dict[str, Any]] = {
    "top_p": {"generation": {"top_p": 0.9}, "loss": {"sampler_correction": {}}},
    "top_k": {"generation": {"top_k": 5}, "loss": {"off_policy_threshold": 0.5}},
    "min_p": {"generation": {"min_p": 0.1}, "loss": {"sampler_correction": {}, "off_policy_threshold": 0.5}},
    "repetition_penalty": {"generation": {"repetition_penalty": 1.1}, "loss": {"sampler_correction": {}}},
}
"""Settings that an engine outside of the training process cannot be compared with the policy under."""


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
@pytest.mark.parametrize("key", FILTERED)
def test_log_probabilities_of_a_filtered_distribution_are_not_compared(engine: str, key: str) -> None:
    def findings_of(loss: dict[str, Any], generation: dict[str, Any]) -> dict[str, str]:
        changes = {"loss": loss, "generation": {"engine": engine} | generation}
        return dict(contradictions(Recipe.model_validate(with_changes(changes))))

    loss, generation = FILTERED[key]["loss"], FILTERED[key]["generation"]
    findings = findings_of(loss, generation)
    users = " and ".join(f"loss.{name}" for name in loss)
    assert f"whose log-probabilities {engine} reports" in findings[f"generation.{key}"]
    assert findings[f"generation.{key}"].endswith(f"remove {key}, or {users}")
    for fine in (findings_of({}, generation), findings_of(loss, {})):
        assert f"generation.{key}" not in fine


def test_contradictions_of_different_sections_come_together() -> None:
    changes = {"loss": {"delta": 1.0}, "optim": {"params": {"a": 1}}, "train": {"eval_every": 1}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(with_changes(changes))
    assert len(str(caught.value).splitlines()) == 3


def test_every_contradiction_of_the_module_has_a_case_here() -> None:
    """Each `yield` of a finding is reached by some case: none can be dead."""
    tree = ast.parse(inspect.getsource(module))
    written = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Yield)}
    reached: set[int] = set()
    for changes, _, _ in CASES:
        generator = contradictions(Recipe.model_validate(with_changes(changes)))
        for _ in generator:
            inner: Any = generator
            while inner.gi_yieldfrom is not None:
                inner = inner.gi_yieldfrom
            reached.add(inner.gi_frame.f_lineno)
    first_lines = {max(line for line in written if line <= reached_line) for reached_line in reached}
    assert first_lines == written
