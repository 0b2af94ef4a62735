"""Reward functions in the shapes that the guides of TRL's documentation have them in; nothing here is for us."""

from __future__ import annotations

import asyncio
import re


def token_count(completion_ids, **kwargs):
    """By token ids."""
    return [float(len(ids)) for ids in completion_ids]


def character_count(completions, **kwargs):
    """By texts."""
    return [float(len(text)) for text in completions]


def distinct_letters(completions, **kwargs):
    """By texts, whole numbers."""
    return [len(set(text.lower())) for text in completions]


def matches_reference(completions, ground_truth, **kwargs):
    """By texts and a column of the data."""
    found = [re.search(r"\\boxed\{(.*?)\}", text) for text in completions]
    return [
        float(one is not None and one.group(1) == truth) for one, truth in zip(found, ground_truth, strict=True)
    ]


def for_sums(prompts, completions, task, **kwargs):
    """Of several tasks for one alone: None elsewhere."""
    return [
        (1.0 if "4" in text else -1.0) if its == "math" else None
        for its, text in zip(task, completions, strict=True)
    ]


def for_programs(prompts, completions, task, **kwargs):
    """The other of several tasks."""
    return [
        (1.0 if "def" in text else -1.0) if its == "coding" else None
        for its, text in zip(task, completions, strict=True)
    ]


async def asynchronous(prompts, completions, **kwargs):
    """Waits for something."""
    await asyncio.sleep(0.01)
    return [float(bool(text)) for text in completions]


def logs_if_it_may(completions, ground_truth, log_extra=None, log_metric=None, **kwargs):
    """Logs where it is called by a trainer."""
    rewards = matches_reference(completions, ground_truth)
    if log_extra:
        log_extra("golden_answer", list(ground_truth))
        log_extra("extracted_answer", ["[none]" if not reward else "found" for reward in rewards])
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
    return rewards


def curriculum(completions, trainer_state, **kwargs):
    """Asks for more as the training goes on."""
    wanted = 4 + 4 * trainer_state.global_step / trainer_state.max_steps
    return [float(len(text) >= wanted) for text in completions]


def takes_all_by_kwargs(completions, **kwargs):
    """Finds everything in `kwargs`."""
    kwargs["log_extra"]("step", [kwargs["trainer_state"].global_step] * len(completions))
    kwargs["log_metric"]("seen/epoch", kwargs["trainer_state"].epoch)
    return [0.0] * len(completions)


def has_think_tags(completions, **kwargs):
    """By messages."""
    return [float(messages[0]["content"].startswith("<think>")) for messages in completions]


ON_TEXTS = (
    token_count,
    character_count,
    distinct_letters,
    matches_reference,
    for_sums,
    for_programs,
    asynchronous,
    logs_if_it_may,
    curriculum,
    takes_all_by_kwargs,
)
