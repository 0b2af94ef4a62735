"""A recipe in words says what it does, and where recipes differ."""

from __future__ import annotations

from typing import Any

from grpo_cli.recipe.schema import Recipe
from grpo_cli.report.recipe_words import differing_settings, in_words, non_defaults


def recipe(**sections: Any) -> Recipe:
    made = {"model": {"name": "m"}, "data": {"name": "d.jsonl"}, "rewards": ["a:first"]}
    return Recipe.model_validate(made | {"train": {"output_dir": "runs/x", "max_steps": 9}} | sections)


def test_a_plain_recipe_in_words() -> None:
    assert in_words(recipe()) == (
        "It trains all weights of m for 9 steps. A step takes 8 prompts from d.jsonl and samples 8 completions of "
        "each, 64 in all. Completions are sampled by the policy itself, at temperature 1, of at most 512 tokens. "
        "They are scored by first. The loss is dapo: ratios are clipped to 0.8 and 1.2 and there is no KL. adamw "
        "updates once a step, with a learning rate of 1e-6 (linear)."
    )


def test_what_is_not_plain_is_said() -> None:
    words = in_words(
        recipe(
            model={"name": "m", "lora": {}},
            rewards=["a:first", {"path": "a:second", "weight": 2.0}],
            generation={"top_p": 0.9, "engine": "vllm", "max_completion_tokens": 1},
            episode={"tools": ["t:add"], "max_turns": 3},
            loss={"type": "sapo", "beta": 0.1},
            train={"output_dir": "x", "epochs": 1.5, "prompts_per_step": 2, "num_iterations": 2},
        )
    )
    for part in (
        "low-rank adapters (rank 16) of m for 1.5 passes over the prompts",
        "by vLLM in the training process, at temperature 1, top_p 0.9, of at most 1 token.",
        "an episode of at most 3 turns with t:add.",
        "scored by first and second (weight 2).",
        "The loss is sapo: a KL to the reference weighs 0.1.",
        "updates 2 times a step",
    ):
        assert part in words


def test_settings_that_are_not_defaults_are_listed_as_a_recipe_writes_them() -> None:
    settings = dict(non_defaults(recipe(loss={"epsilon": 0.3, "beta": 0.0})))
    assert settings["loss.epsilon"] == "0.3"
    assert settings["rewards.0.path"] == '"a:first"'
    assert "loss.beta" not in settings


def test_settings_in_which_any_of_several_runs_differs_are_listed_for_all() -> None:
    third = recipe(
        loss={"epsilon": 0.3}, rewards=["a:first", "a:b"], train={"output_dir": "runs/y", "max_steps": 9}
    )
    rows = differing_settings([recipe(), recipe(), third])
    assert [(row.key, row.values) for row in rows][-1] == ("loss.epsilon", ["0.2", "0.2", "0.3"])
    assert [row.key for row in rows] == ["rewards.1", "loss.epsilon"]
    assert rows[0].values[:2] == ["absent", "absent"]
    assert differing_settings([recipe()]) == []
