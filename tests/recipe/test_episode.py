"""The section `episode`: one environment, or several by name, each with a short form."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_cli.recipe.episode import EnvironmentConfig
from grpo_cli.recipe.load import dump_recipe, load_recipe
from tests.recipe.recipes import PLAIN, errors, load

CHESS = EnvironmentConfig(path="games:Chess")
LEVEL = EnvironmentConfig(path="games:Chess", params={"level": 2})


@pytest.mark.parametrize(
    ("written", "environments"),
    [
        ("games:Chess", {None: CHESS}),
        ("{path: games:Chess}", {None: CHESS}),
        ("{path: games:Chess, params: {level: 2}}", {None: LEVEL}),
        ("{chess: games:Chess}", {"chess": CHESS}),
        (
            "{chess: games:Chess, hard: {path: games:Chess, params: {level: 2}}}",
            {"chess": CHESS, "hard": LEVEL},
        ),
    ],
)
def test_an_environment_is_one_or_several_by_name(
    file: Path, written: str, environments: dict[str | None, EnvironmentConfig]
) -> None:
    recipe = load(file, PLAIN + f"episode: {{environment: {written}}}")
    assert recipe.episode is not None
    assert recipe.episode.environments == environments
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


def test_the_command_line_sets_what_is_inside_an_environment(file: Path) -> None:
    text = PLAIN + "episode: {environment: {path: games:Chess, params: {level: 1}}}"
    recipe = load(file, text, "episode.environment.params.level=2", "episode.max_turns=3")
    assert recipe.episode is not None
    assert recipe.episode.environments == {None: LEVEL}
    assert recipe.episode.max_turns == 3


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{environment: 3}", "episode.environment must be a section with keys of its own, not 3"),
        ("{environment: [a:b]}", "episode.environment must be a section with keys of its own, not a list"),
        ("{environment: {path: 3}}", "episode.environment.path must be a string, not 3"),
        (
            "{environment: {path: a:b, parms: {}}}",
            "episode.environment.parms is not a setting; did you mean episode.environment.params?",
        ),
        ("{environment: {a: {params: {}}}}", "episode.environment.a.path is missing"),
        ("{environment: {a: 3}}", "episode.environment.a must be a section with keys of its own, not 3"),
        ("{environment: a:b, turns: 3}", "episode.turns is not a setting; did you mean episode.max_turns?"),
        ("{environment: a:b, on_error: none}", "it must be one of 'tell', 'end' or 'raise'"),
        ("{environment: a:b, timeout_s: 0}", "episode.timeout_s is 0; it should be greater than 0"),
        ("{tools: a:b}", "episode.tools must be a list, not the string 'a:b'"),
    ],
)
def test_what_is_wrong_with_an_episode_is_named(file: Path, written: str, message: str) -> None:
    (line,) = errors(file, PLAIN + f"episode: {written}")
    assert line.startswith("recipe.yaml:10: ")
    assert message in line


def test_prompts_and_rewards_can_be_the_environments(file: Path) -> None:
    text = "model: {name: m}\nepisode: {environment: games:Chess}\ntrain: {output_dir: run, max_steps: 2}\n"
    recipe = load(file, text)
    assert recipe.data.name == ""
    assert recipe.rewards == []


def test_without_an_environment_prompts_and_rewards_are_missing(file: Path) -> None:
    text = "model: {name: m}\nepisode: {tools: [a:b]}\ntrain: {output_dir: run, max_steps: 2}\n"
    assert errors(file, text) == [
        "recipe.yaml: rewards is missing or empty; name a reward function",
        "recipe.yaml: data.name is missing",
    ]
