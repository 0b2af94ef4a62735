from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from grpo_cli.errors import UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.recipe.schema import LossConfig, Recipe, RewardConfig
from grpo_cli.recipe.section import Section

PLAIN: dict[str, Any] = {
    "model": {"name": "m"},
    "data": {"name": "d"},
    "rewards": ["my:score"],
    "train": {"output_dir": "run", "max_steps": 1},
}

DEFAULTS: dict[str, Any] = {
    "model.dtype": "float32",
    "model.compute_dtype": "auto",
    "model.trust_remote_code": False,
    "model.gradient_checkpointing": False,
    "model.lora": None,
    "model.reference": None,
    "data.prompt_column": "prompt",
    "data.columns": {},
    "data.long_prompts": "drop",
    "data.max_prompt_tokens": None,
    "data.shuffle": True,
    "data.eval": None,
    "rewards.0.weight": 1.0,
    "rewards.0.params": {},
    "rewards.0.timeout_s": None,
    "rewards.0.on_error": "raise",
    "rewards.0.workers": 0,
    "generation.engine": "transformers",
    "generation.num_generations": 8,
    "generation.max_completion_tokens": 512,
    "generation.temperature": 1.0,
    "generation.top_p": 1.0,
    "generation.top_k": 0,
    "generation.min_p": 0.0,
    "generation.repetition_penalty": 1.0,
    "generation.stop": [],
    "loss.type": "dapo",
    "loss.beta": 0.0,
    "loss.kl_estimator": "k3",
    "loss.bias_corrected_kl": False,
    "loss.epsilon": 0.2,
    "loss.epsilon_high": None,
    "loss.delta": None,
    "loss.importance_level": "token",
    "loss.scale_rewards": "group",
    "loss.aggregation": "sum_then_normalize",
    "loss.mask_truncated": False,
    "loss.off_policy_threshold": None,
    "loss.sampler_correction": None,
    "loss.top_entropy_quantile": 1.0,
    "loss.entropy_coef": 0.0,
    "optim.name": "adamw",
    "optim.learning_rate": 1e-6,
    "optim.weight_decay": 0.0,
    "optim.betas": (0.9, 0.999),
    "optim.scheduler": "linear",
    "optim.warmup_ratio": 0.0,
    "optim.max_grad_norm": 1.0,
    "train.epochs": None,
    "train.prompts_per_step": 8,
    "train.optimizer_steps_per_rollout": 1,
    "train.num_iterations": 1,
    "train.seed": 42,
    "train.eval_every": None,
    "train.callbacks": [],
    "logging.every": 1,
    "logging.print_completions": 0,
    "logging.project": None,
    "logging.trackers": ["tensorboard"],
}


def sections(model: type[BaseModel] = Recipe) -> Iterator[type[BaseModel]]:
    """A model and every section inside it."""
    yield model
    for info in model.model_fields.values():
        yield from (inner for part in parts(info.annotation) for inner in sections(part))


def parts(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from parts(argument)


@pytest.mark.parametrize("key", DEFAULTS)
def test_the_defaults_are_those_of_the_design(key: str) -> None:
    value: Any = load_recipe(PLAIN)
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    assert value == DEFAULTS[key]
    assert type(value) is type(DEFAULTS[key])


@pytest.mark.parametrize("section", [*dict.fromkeys(sections())], ids=lambda section: section.__name__)
def test_every_key_has_a_line_that_explains_it(section: type[BaseModel]) -> None:
    for name, info in section.model_fields.items():
        assert info.description, f"{section.__name__}.{name} has no docstring"
        assert info.description.strip().endswith("."), f"{section.__name__}.{name}: {info.description}"


@pytest.mark.parametrize("section", [*dict.fromkeys(sections())], ids=lambda section: section.__name__)
def test_every_section_refuses_unknown_keys_and_does_not_coerce(section: type[BaseModel]) -> None:
    assert issubclass(section, Section)
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["strict"]
    assert section.model_config["frozen"]
    assert not section.model_config["allow_inf_nan"]


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(PLAIN).train.seed = 7  # type: ignore[misc]


def test_recipes_do_not_share_their_lists() -> None:
    one, other = load_recipe(PLAIN), load_recipe(PLAIN)
    one.generation.stop.append("x")
    one.rewards[0].params["x"] = 1
    assert other.generation.stop == []
    assert other.rewards[0].params == {}
    assert load_recipe(PLAIN).generation.stop == []


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        ({"path": "rewards.length:reward_len"}, "reward_len"),
        ({"path": "my:Judge.score"}, "Judge.score"),
        ({"path": "length"}, "length"),
        ({"path": "my:score", "name": "other"}, "other"),
        ({"model": "org/reward-model"}, "reward-model"),
        ({"model": "models/judge/"}, "judge"),
    ],
)
def test_a_reward_is_called_after_its_function_or_model(reward: dict[str, Any], name: str) -> None:
    assert RewardConfig(**reward).metric_name == name


def test_a_string_is_short_for_a_reward_with_that_path() -> None:
    assert load_recipe(PLAIN).rewards == [RewardConfig(path="my:score")]


@pytest.mark.parametrize(
    ("loss", "high"),
    [
        ({}, 0.2),
        ({"epsilon": 0.1}, 0.1),
        ({"epsilon_high": 0.28}, 0.28),
        ({"epsilon_high": 0.0}, 0.0),
        ({"type": "cispo"}, 5.0),
        ({"type": "cispo", "epsilon_high": 3.0}, 3.0),
        ({"type": "my:loss", "epsilon": 0.1}, 0.1),
        ({"type": "my:loss", "epsilon_high": 3.0}, 3.0),
    ],
)
def test_the_upper_clip_is_epsilon_unless_given(loss: dict[str, Any], high: float) -> None:
    assert LossConfig(**loss).clip_high == high


@pytest.mark.parametrize("value", ["resampel", "true", None])
def test_zero_variance_groups_are_dropped_resampled_or_kept(value: Any) -> None:
    for allowed in (True, False, "resample"):
        assert LossConfig(drop_zero_variance_groups=allowed).drop_zero_variance_groups == allowed
    with pytest.raises(
        UserError, match=r"drop_zero_variance_groups is .*; it must be one of false, true or 'resample'"
    ):
        load_recipe(PLAIN | {"loss": {"drop_zero_variance_groups": value}})


@pytest.mark.parametrize(
    "statement", ["import grpo_cli.recipe.load", "import grpo_cli.cli", "from grpo_cli import Recipe"]
)
def test_a_recipe_is_read_without_torch(statement: str) -> None:
    code = f"import sys\n{statement}\nassert not {{'torch', 'transformers', 'accelerate'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
