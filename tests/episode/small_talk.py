"""A tiny model that holds conversations: its turns end soon, and an environment answers each of them."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import tiny_llama
from tests.episode.chat import chat_tokenizer

STOPS = list("abcdefghijklmnopqrstuvwxyz ")
"""Ends of turns: left alone, a model with random weights talks until it is cut off."""


class SmallTalk:
    """Answers what is said, up to three times, and rewards vowels; how long it takes follows from nothing."""

    def __init__(self, longest_pause_s: float = 0.0) -> None:
        self._longest_pause_s = longest_pause_s

    def reset(self, seed: int, **columns: Any) -> str:
        self._pause()
        self.seed, self.process = seed, os.getpid()
        self.last = 1 + seed % 3
        self.texts: list[str] = []
        return f" Talk, {seed % 97}."

    def respond(self, text: str) -> str | None:
        self._pause()
        self.texts.append(text)
        return None if len(self.texts) > self.last else f"{len(text)} of {self.seed % 97}?"

    def get_reward(self) -> float:
        assert self.process == os.getpid(), "it is scored where it was played"
        said = "".join(self.texts)
        return sum(map(said.count, "aeiou")) + len(self.texts) / 10 - len(said) / 100

    def _pause(self) -> None:
        time.sleep(random.SystemRandom().uniform(0, self._longest_pause_s))


def most_talk(environments: Sequence[SmallTalk]) -> list[float]:
    """A reward that looks at the environments."""
    assert all(environment.process == os.getpid() for environment in environments)
    return [float(len(environment.texts)) for environment in environments]


def small_talk(folder: Path, output: Path, template: str = "qwen2_5", **model: Any) -> dict[str, Any]:
    """A recipe of episodes on a model that is written to `folder`."""
    save_model(folder, template, **model)
    return {
        "model": {"name": str(folder)},
        "episode": {"environment": "tests.episode.small_talk:SmallTalk", "max_turns": 4, "workers": 4},
        "generation": {"num_generations": 4, "max_completion_tokens": 160, "stop": STOPS},
        "optim": {"learning_rate": 1e-3},
        "train": {"output_dir": str(output), "max_steps": 3, "prompts_per_step": 3},
        "logging": {"trackers": [], "print_completions": 0},
    }


COUNTING = "{{ '<|im_start|>system\n' }}{{ messages | length }}{{ ' messages<|im_end|>\n' }}"
"""Before a chat template: its history is written anew with every message."""


def save_model(folder: Path, template: str = "qwen2_5", *, rewrites: bool = False, **model: Any) -> None:
    """Write a tiny model and a tokenizer with one of the chat templates."""
    tokenizer = chat_tokenizer(template)
    if rewrites:
        tokenizer.chat_template = COUNTING + tokenizer.chat_template
    settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    tiny_llama(**settings, max_position_embeddings=1024, **model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
