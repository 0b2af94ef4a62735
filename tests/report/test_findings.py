"""Each rule finds what it is for, and not what is only near it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cli.recipe.load import load_recipe
from grpo_cli.report.finding import Finding
from grpo_cli.report.findings import RULES, WORTH_TELLING, find
from grpo_cli.report.run import Run
from tests.report.made_up import RECIPE, STEPS, WELL, Curve, made_up, ramp, seldom

FLAT: dict[str, Curve] = {"reward": ramp(0.3, 0.3)}
TWO_REWARDS = {"rewards": ["rewards.length:reward_len", "rewards.format:think_answer_format"]}
TOOLS = {"episode": {"tools": ["my_tools:weather"]}}

APART: dict[str, Curve] = {"sampling/sampling_logp_difference/mean": 0.1}
SKIPPED: dict[str, Curve] = {"train/skipped_steps": seldom(0, 2)}
SURE: dict[str, Curve] = FLAT | {"entropy": ramp(1, 0.1)}

LOADED, LOADED_WITH_TOOLS = load_recipe(RECIPE), load_recipe(RECIPE | TOOLS | TWO_REWARDS)

HAS_AND_NEAR: dict[str, tuple[Mapping[str, Curve], Mapping[str, Curve]]] = {
    "constant_reward": (
        {"reward": 0, "rewards/reward_len/mean": 0, "rewards/reward_len/std": 0},
        {"reward": 0, "rewards/reward_len/mean": 0, "rewards/reward_len/std": 0.01},
    ),
    "no_spread": (FLAT | {"frac_reward_zero_std": 0.6}, FLAT | {"frac_reward_zero_std": 0.4}),
    "skipped_groups": ({"frac_groups_skipped": 0.6}, {"frac_groups_skipped": 0.4}),
    "reward_fell": ({"reward": ramp(0.6, 0.3)}, FLAT),
    "learning_rate_too_high": (
        {"reward": [0.3, -0.7, *[-0.7] * (STEPS - 2)]},
        {"reward": [0.3, -0.4, *[-0.4] * (STEPS - 2)]},
    ),
    "learning_rate_too_low": (
        FLAT | {"entropy": ramp(1, 1), "kl": 0.0, "completions/mean_length": ramp(100, 100)},
        FLAT | {"entropy": ramp(1, 0.9), "kl": 0.0, "completions/mean_length": ramp(100, 100)},
    ),
    "entropy_collapse": (FLAT | {"entropy": ramp(1, 0.1)}, FLAT | {"entropy": ramp(1, 0.3)}),
    "kl_running_away": ({"kl": ramp(0, 1.5)}, {"kl": ramp(0, 0.9)}),
    "clipped_ratio": ({"clip_ratio/region_mean": 0.9}, {"clip_ratio/region_mean": 0.2}),
    "gradient_clipped": ({"grad_norm": 5}, {"grad_norm": 2}),
    "sampler_mismatch": (
        {"sampling/sampling_logp_difference/mean": ramp(0.01, 0.1)},
        {"sampling/sampling_logp_difference/mean": ramp(0.01, 0.03)},
    ),
    "skipped_steps": ({"train/skipped_steps": seldom(0, 2)}, {"train/skipped_steps": 0}),
    "truncated": ({"completions/clipped_ratio": 0.7}, {"completions/clipped_ratio": 0.4}),
    "length_without_reward": (
        FLAT | {"completions/mean_length": ramp(100, 250)},
        {"completions/mean_length": ramp(100, 250)},
    ),
    "failing_tools": ({"tools/failure_frequency": 0.5}, {"tools/failure_frequency": 0.2}),
    "lost_episodes": ({"rollout/lost_completions": seldom(0, 8)}, {"rollout/lost_completions": 0}),
    "overfitting": (
        {"eval_reward": seldom(0.2, 0.4, 0.5, 0.48, 0.3, 0.2)},
        {"eval_reward": seldom(0.4, 0.6, 0.4, 0.55, 0.45, 0.45)},
    ),
    "evaluation_missing": ({"eval_reward": None}, {"eval_reward": seldom(0.2, 0.5)}),
    "evaluation_noisy": ({"eval_reward": seldom(0.3, 0.32)}, {"eval_reward": seldom(0.3, 0.5)}),
    "bottleneck": ({"time/generate": 9.5}, {"time/generate": 7}),
}
"""By rule: what shows it, and what comes near."""


def the(rule: str, run: Run) -> Finding | None:
    return next((finding for finding in find(run) if finding.rule == rule), None)


def test_a_run_that_is_well_has_no_findings() -> None:
    assert find(made_up()) == []


@pytest.mark.parametrize("rule", HAS_AND_NEAR)
def test_a_rule_finds_its_own_and_not_what_is_near(rule: str) -> None:
    has, near = HAS_AND_NEAR[rule]
    found = the(rule, made_up(has))
    assert found is not None
    assert 0 < found.badness <= 1
    assert any(c.isdigit() for c in found.figure + found.advice)
    assert the(rule, made_up(near)) is None


def test_every_rule_is_tested() -> None:
    elsewhere = {"repeated_completions", "drowned_reward", "unused_tools"}
    assert {rule.__name__ for rule in RULES} == HAS_AND_NEAR.keys() | elsewhere


def test_every_rule_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs/report.md").read_text(encoding="utf-8")
    assert [rule.__name__ for rule in RULES if f"| `{rule.__name__}` |" not in page] == []


def test_findings_come_worst_first() -> None:
    wrong = made_up(FLAT | {"entropy": ramp(1, 0.01), "eval_reward": None, "completions/clipped_ratio": 0.7})
    badness = [finding.badness for finding in find(wrong)]
    assert len(badness) >= 3
    assert badness == sorted(badness, reverse=True)


def test_a_reward_that_never_applied_is_found() -> None:
    silent: dict[str, Curve] = {
        "rewards/reward_len/mean": [None] * STEPS,
        "rewards/reward_len/std": [None] * STEPS,
    }
    run = made_up(silent)
    for row in run.rows:  # where a number is not finite, the file has a null
        row |= {"rewards/reward_len/mean": None, "rewards/reward_len/std": None}
    found = the("constant_reward", run)
    assert found is not None
    assert "has not scored any" in found.figure


def test_solved_prompts_are_told_from_those_that_are_too_hard() -> None:
    solved, hard = (the("no_spread", made_up(c | {"frac_reward_zero_std": 0.8})) for c in ({}, FLAT))
    assert solved is not None
    assert hard is not None
    assert solved.badness < 0.4 < hard.badness


def test_the_weight_that_makes_both_rewards_count_is_computed() -> None:
    spreads: dict[str, Curve] = {
        "rewards/reward_len/std": 30.0,
        "rewards/think_answer_format/mean": 0.5,
        "rewards/think_answer_format/std": 0.3,
    }
    found = the("drowned_reward", made_up(spreads, TWO_REWARDS))
    assert found is not None
    assert "rewards.0.weight to 0.01" in found.advice
    spreads["rewards/reward_len/std"] = 3.0
    assert the("drowned_reward", made_up(spreads, TWO_REWARDS)) is None
    weighted = {"rewards": [{"path": "rewards.length:reward_len", "weight": 0.01}, *TWO_REWARDS["rewards"][1:]]}
    spreads["rewards/reward_len/std"] = 30.0
    assert the("drowned_reward", made_up(spreads, weighted)) is None


def test_a_small_reward_that_is_learned_is_not_drowned_and_one_weighed_less_is_hardly_wrong() -> None:
    spreads: dict[str, Curve] = {"rewards/think_answer_format/mean": 0.5, "rewards/think_answer_format/std": 0.1}
    light: dict[str, Any] = {
        "rewards": [TWO_REWARDS["rewards"][0], {"path": TWO_REWARDS["rewards"][1], "weight": 0.1}]
    }
    found = the("drowned_reward", made_up(spreads, light))
    assert found is not None
    assert found.badness < WORTH_TELLING
    learned = spreads | {"rewards/think_answer_format/mean": ramp(0.3, 0.9)}
    assert the("drowned_reward", made_up(learned, light)) is None


def test_a_reward_of_no_weight_may_be_constant() -> None:
    logged = {"rewards": [*RECIPE["rewards"], {"path": "rewards.format:think_answer_format", "weight": 0}]}
    constant: dict[str, Curve] = {"rewards/think_answer_format/mean": 0, "rewards/think_answer_format/std": 0}
    assert the("constant_reward", made_up(constant, logged)) is None
    found = the("constant_reward", made_up(constant, TWO_REWARDS))
    assert found is not None
    assert found.badness == 0.5


def test_tools_that_are_never_called_are_found() -> None:
    assert the("unused_tools", made_up({"tools/call_frequency": 0}, TOOLS)) is not None
    assert the("unused_tools", made_up({"tools/call_frequency": 0.1}, TOOLS)) is None
    assert the("unused_tools", made_up({"tools/call_frequency": 0})) is None


def test_tool_names_that_are_not_there_are_counted() -> None:
    calls: dict[str, Curve] = {"tools/failure_frequency": 0.5, "tools/unknown_name_total": 3}
    found = the("failing_tools", made_up(calls, TOOLS))
    assert found is not None
    assert "72 calls of the run named no tool" in found.figure


def test_an_entropy_that_jumps_is_a_learning_rate_too_high() -> None:
    jump: dict[str, Curve] = {"entropy": [1.0, 0.4, *[0.4] * (STEPS - 2)]}
    found = the("learning_rate_too_high", made_up(FLAT | jump))
    assert found is not None
    assert found.steps == (1, 2)
    assert the("learning_rate_too_high", made_up(jump)) is None  # the reward rose


def test_a_policy_that_has_learned_may_be_surer() -> None:
    assert the("entropy_collapse", made_up({"entropy": ramp(1, 0.15)})) is None
    assert the("entropy_collapse", made_up({"entropy": ramp(1, 0.01)})) is not None


def test_a_reward_that_rose_at_once_counts_as_learned() -> None:
    at_once: dict[str, Curve] = {"reward": [-5.0, 2.0, 9.0, 10.0, *[10.0] * (STEPS - 4)]}
    length: dict[str, Curve] = {"completions/mean_length": ramp(100, 250)}
    assert the("length_without_reward", made_up(length | at_once)) is None


def test_a_reward_that_fell_at_once_and_came_back_has_not_been_learned() -> None:
    back: dict[str, Curve] = {"reward": [0.3, *[-3.0] * 4, *[0.3] * (STEPS - 5)]}
    length: dict[str, Curve] = {"completions/mean_length": ramp(100, 250)}
    assert the("length_without_reward", made_up(length | back)) is not None


def test_skipped_optimizer_steps_are_counted_among_all() -> None:
    twice = {"train": {"num_iterations": 2}}
    found = the("skipped_steps", made_up({"train/skipped_steps": [0.0] * 9 + [2.0] + [0.0] * 14}, twice))
    assert found is not None
    assert found.figure.startswith("2 of 48 optimizer steps were skipped, the first of them in step 10")
    assert found.steps == (10, 10)


def test_what_is_advised_depends_on_the_recipe() -> None:
    falls: dict[str, Curve] = {"reward": ramp(0.6, 0.3)}
    plain = the("reward_fell", made_up(falls))
    served = the("reward_fell", made_up(falls, {"generation": {"engine": "vllm"}, "train": {"num_iterations": 2}}))
    assert plain is not None
    assert served is not None
    assert plain.advice == "Lower optim.learning_rate from 1e-06 to 1e-07."
    assert "train.num_iterations: 1" in served.advice
    assert "loss.sampler_correction" in served.advice


def test_a_ratio_per_completion_may_clip_more() -> None:
    of_completions = {"loss": {"importance_level": "sequence"}}
    assert the("clipped_ratio", made_up({"clip_ratio/region_mean": 0.6})) is not None
    assert the("clipped_ratio", made_up({"clip_ratio/region_mean": 0.6}, of_completions)) is None


def test_what_cispo_clips_keeps_its_gradient() -> None:
    clipped: dict[str, Curve] = {"clip_ratio/region_mean": None, "cispo_clip_ratio": 0.9}
    assert the("clipped_ratio", made_up(clipped, {"loss": {"type": "cispo"}})) is None


@pytest.mark.parametrize(
    ("rewards", "advised"),
    [
        ([{"path": "rewards.length:reward_len", "workers": 2}], "rewards.0.isolate: true"),
        (["rewards.length:reward_len"], "Set rewards.0.workers: 8"),
        ([], "get_reward of the environment"),
    ],
)
def test_slow_rewards_are_advised_in_whole_sentences(rewards: list[Any], advised: str) -> None:
    recipe: dict[str, Any] = {"rewards": rewards}
    if not rewards:
        recipe["episode"] = {"environment": "environments.guessing:GuessingGame"}
    found = the("bottleneck", made_up({"time/reward": 6}, recipe))
    assert found is not None
    assert advised in found.advice
    assert found.advice.endswith(".")


@pytest.mark.parametrize(
    ("rule", "curves", "recipe", "advised", "not_advised"),
    [
        ("sampler_mismatch", APART, {"generation": {"engine": "vllm"}}, "vllm: {dtype: float32}", "serve"),
        (
            "sampler_mismatch", APART,
            {"generation": {"engine": "vllm_server", "server": {"urls": ["http://10.0.0.5:8000"]}}},
            "grpo serve with --dtype float32", "generation.vllm",
        ),
        ("sampler_mismatch", APART, {}, "model.compute_dtype: float32", "vllm"),
        ("skipped_steps", SKIPPED, {"model": {"dtype": "bfloat16"}}, "model.dtype: float32", "compute_dtype"),
        ("skipped_steps", SKIPPED, {}, "model.compute_dtype: float32", "model.dtype"),
        ("entropy_collapse", SURE, {"train": {"num_iterations": 2}}, "loss.epsilon_high: 0.28", "none"),
        (
            "entropy_collapse", SURE, {"train": {"num_iterations": 2}, "loss": {"type": "cispo"}},
            "loss.entropy_coef", "epsilon_high",
        ),
    ],
)  # fmt: skip
def test_only_what_the_recipe_takes_is_advised(
    rule: str, curves: dict[str, Curve], recipe: dict[str, Any], advised: str, not_advised: str
) -> None:
    found = the(rule, made_up(curves, recipe))
    assert found is not None
    assert advised in found.advice
    assert not_advised not in found.advice


def test_truncation_that_goes_away_by_itself_weighs_less() -> None:
    stays, goes = (the("truncated", made_up(FLAT | {"completions/clipped_ratio": c})) for c in (0.7, ramp(1, 0.5)))
    assert stays is not None
    assert goes is not None
    assert goes.badness < 0.4 < stays.badness


def test_the_prompts_that_an_evaluation_needs_are_computed() -> None:
    noisy = made_up({"eval_reward": seldom(0.30, 0.34), "eval_reward_std": seldom(0.3, 0.3)})
    found = the("evaluation_noisy", noisy)
    assert found is not None
    # Two means of n prompts are 2 standard errors apart by 0.04 where 2 · sqrt(2) · 0.3 / sqrt(n) is 0.04.
    assert "data.eval.limit: 450" in found.advice


names = st.sampled_from([*WELL, "cispo_clip_ratio", "tools/failure_frequency", "rollout/lost_completions"])
wild = st.none() | st.floats(allow_nan=False, allow_infinity=False)
tame = st.none() | st.floats(min_value=0, max_value=1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(names, wild) | st.dictionaries(names, tame), min_size=1, max_size=40))
def test_no_rule_fails_for_want_of_numbers_or_for_strange_ones(columns: list[dict[str, Any]]) -> None:
    rows = [{"step": step} | row for step, row in enumerate(columns, 1)]
    for recipe in (LOADED, LOADED_WITH_TOOLS):
        assert all(isinstance(finding, Finding) for finding in find(Run(Path("nowhere"), recipe, rows, False)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(names, tame), min_size=1, max_size=40))
def test_badness_is_between_nothing_and_one(columns: list[dict[str, Any]]) -> None:
    rows = [{"step": step} | row for step, row in enumerate(columns, 1)]
    assert all(0 < finding.badness <= 1 for finding in find(Run(Path("nowhere"), LOADED, rows, False)))


def test_a_single_step_and_none_at_all_are_no_reason_to_fail() -> None:
    for rows in ([], made_up().rows[:1]):
        assert all(
            finding.badness < 0.5 for finding in find(Run(Path("nowhere"), load_recipe(RECIPE), rows, False))
        )


def test_ten_thousand_steps_take_less_than_half_a_second() -> None:
    rows = [row | {"step": place + 1} for place, row in enumerate(list(made_up().rows) * 417)]
    run = Run(Path("nowhere"), load_recipe(RECIPE), rows, True)
    started = time.process_time()
    find(run)
    assert len(rows) > 10_000
    assert time.process_time() - started < 0.5
