"""Runs that are made to fail, trained for real: the first finding names what was planted. And one that is well.

The model is a tiny one that has been taught to answer each prompt with a few letters of the prompt's own, so that
it has prompts to tell apart, something to choose between, and an end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import grpo_cli
from grpo_cli.report.findings import find
from grpo_cli.report.run import read_run
from tests.conftest import byte_tokenizer, tiny_llama

pytestmark = pytest.mark.slow

PROMPTS = 4
LETTERS = ["mynbiq", "pmjzls", "gqejxd", "tirwze"]
"""Of each prompt."""
LEARNING_RATE = 1e-3


@pytest.fixture(scope="module")
def taught_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    tokenizer, model, rng = byte_tokenizer(), tiny_llama(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = []
        for _ in range(32):
            number = rng.randrange(PROMPTS)
            prompt = tokenizer(f"question {number}:")["input_ids"]
            answer = "".join(rng.choice(LETTERS[number]) for _ in range(rng.randint(3, 10)))
            rows.append((prompt, tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]))
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids, labels = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("taught")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(taught_model: Path, tmp_path: Path) -> dict[str, Any]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "question {i}:", "letter": "{LETTERS[i][0]}"}}\n' for i in range(4)))
    return {
        "model": {"name": str(taught_model)},
        "data": {"name": str(prompts)},
        "generation": {"num_generations": 8, "max_completion_tokens": 24},
        "optim": {"learning_rate": LEARNING_RATE},
        "train": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 24,
            "prompts_per_step": PROMPTS,
            "save_every": 0,
        },
        "logging": {"trackers": []},
    }


def rules_of(recipe: dict[str, Any], reward: Callable[..., Any], least: float = 0.5) -> list[str]:
    """Train, and name the findings at least so bad, worst first."""
    result = grpo_cli.train(recipe, rewards=[reward], console=Console(quiet=True))
    return [finding.rule for finding in find(read_run(result.output_dir)) if finding.badness >= least]


def seven_letters_many_vowels(completions: Sequence[str], **_: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) - abs(7 - len(text)) / 7 for text in completions]


def twenty_characters(completions: Sequence[str], **_: Any) -> list[float]:
    return [-abs(20.0 - len(text)) for text in completions]


def always_one(completions: Sequence[str], **_: Any) -> list[float]:
    return [1.0 for _ in completions]


def one_letter_or_better(completions: Sequence[str], letter: Sequence[str], **_: Any) -> list[float]:
    """Half for what is soon found, its share of one letter; the other half for a 7, which is never tried."""
    shares = [text.count(own) / max(len(text), 1) for text, own in zip(completions, letter, strict=True)]
    return [share / 2 + ("7" in text) / 2 for share, text in zip(shares, completions, strict=True)]


def number_of_es(completions: Sequence[str], **_: Any) -> list[float]:
    return [float(text.count("e")) for text in completions]


def test_a_run_that_is_well_has_no_finding_of_weight(recipe: dict[str, Any]) -> None:
    assert rules_of(recipe, seven_letters_many_vowels) == []


def test_a_learning_rate_a_hundred_times_too_high_is_found(recipe: dict[str, Any]) -> None:
    recipe["optim"]["learning_rate"] = 100 * LEARNING_RATE
    assert rules_of(recipe, seven_letters_many_vowels)[0] == "learning_rate_too_high"


def test_a_constant_reward_is_found(recipe: dict[str, Any]) -> None:
    assert rules_of(recipe, always_one)[0] == "constant_reward"


def test_a_limit_that_cuts_answers_off_is_found(recipe: dict[str, Any]) -> None:
    recipe["generation"]["max_completion_tokens"] = 8
    assert rules_of(recipe, twenty_characters, least=0.0)[0] == "truncated"


def test_a_collapse_of_entropy_without_a_kl_is_found(recipe: dict[str, Any]) -> None:
    recipe["optim"] |= {"learning_rate": 5 * LEARNING_RATE, "scheduler": "constant"}
    assert rules_of(recipe, one_letter_or_better)[0] == "entropy_collapse"


def test_a_reward_that_is_had_without_the_prompt_is_found(recipe: dict[str, Any]) -> None:
    recipe["optim"]["learning_rate"] = 5 * LEARNING_RATE
    assert rules_of(recipe, number_of_es)[0] == "repeated_completions"
