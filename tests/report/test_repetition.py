"""Completions that say the same, or what the prompt has said."""

from __future__ import annotations

import pytest

from grpo_cli.report.finding import Finding
from grpo_cli.report.findings import find
from grpo_cli.report.run import Run
from tests.report.made_up import made_up, ramp, say

ANSWERS = [
    ["The garden needs water", "Rain is on its way", "Look at the leaves first", "A can of two litres"],
    ["Trains leave at noon", "Take the bus to town", "My bicycle is faster", "Walk along the river"],
    ["Bread wants an hour", "Knead it twice by hand", "An oven at full heat", "Flour from the old mill"],
]
"""Of three prompts, four each, and none like another."""

SAME = [["Great post, thanks for sharing!"] * 4] * 3


def the_finding(run: Run) -> Finding | None:
    return next((finding for finding in find(run) if finding.rule == "repeated_completions"), None)


def test_completions_that_differ_are_no_finding() -> None:
    assert the_finding(made_up(said={1: say(1, ANSWERS), 24: say(24, ANSWERS)})) is None


def test_the_same_to_every_prompt_is_found_and_shown() -> None:
    found = the_finding(made_up(said={1: say(1, ANSWERS), 24: say(24, SAME)}))
    assert found is not None
    assert found.steps == (24, 24)
    assert found.figure.startswith("100% of pairs of completions of different prompts say the same (0% in step 1")
    assert "Great post, thanks for sharing!" in found.figure
    assert found.badness > 0.8


def test_it_weighs_less_where_the_reward_did_not_rise() -> None:
    found = the_finding(made_up({"reward": ramp(0.3, 0.3)}, said={1: say(1, ANSWERS), 24: say(24, SAME)}))
    assert found is not None
    assert found.badness < 0.8


def test_nearly_the_same_is_the_same() -> None:
    ends = ["!", "...", " here"]
    nearly = [[f"Great post, thanks for sharing{end}"] * 4 for end in ends]
    found = the_finding(made_up(said={1: say(1, ANSWERS), 24: say(24, nearly)}))
    assert found is not None
    assert "of different prompts" in found.figure


def test_answers_of_one_form_with_other_numbers_are_not_the_same() -> None:
    numbers = [[f"The answer to the question is {10 * group + one}." for one in range(4)] for group in range(3)]
    assert the_finding(made_up(said={1: say(1, ANSWERS), 24: say(24, numbers)})) is None


def test_the_same_to_one_prompt_is_not_the_same_to_all() -> None:
    groups = [[texts[0]] * 4 for texts in ANSWERS]
    found = the_finding(made_up(said={1: say(1, ANSWERS), 24: say(24, groups)}))
    assert found is not None
    assert "completions of one prompt" in found.figure
    assert found.badness < 0.5


def test_prompts_that_are_all_the_same_may_have_the_same_answer() -> None:
    said = {1: say(1, ANSWERS, prompt="Guess my number"), 24: say(24, SAME, prompt="Guess my number")}
    found = the_finding(made_up(said=said))
    assert found is not None
    assert "completions of one prompt" in found.figure


def test_what_was_so_from_the_start_is_what_the_task_asks_for() -> None:
    assert the_finding(made_up(said={1: say(1, SAME), 24: say(24, SAME)})) is None


@pytest.mark.parametrize("as_chat", [False, True])
def test_copies_of_the_prompt_are_found(as_chat: bool) -> None:
    text = "SUBREDDIT: r/gardening\nTITLE: What to do?"
    prompt = [{"role": "user", "content": text}] if as_chat else text
    copies = [[f"{text[0]} SUBREDDIT:  r/Gardening" for text in texts] for texts in ANSWERS]
    found = the_finding(made_up(said={1: say(1, ANSWERS, prompt=prompt), 24: say(24, copies, prompt=prompt)}))
    assert found is not None
    assert found.figure.startswith("100% of completions repeat a part of their prompt (0% in step 1")


def test_a_short_answer_that_the_prompt_has_is_no_copy() -> None:
    question = "Does the right road go to the left?"
    short = say(24, [["the right", "the left", "right road", "left"]] * 3, prompt=question)
    assert the_finding(made_up(said={1: say(1, ANSWERS, prompt=question), 24: short})) is None


def test_cut_off_answers_say_how_many_would_have_ended() -> None:
    cut = {"completions/clipped_ratio": 0.9, "reward": ramp(0.3, 0.3)}
    lasting = say(24, [["a"] * 9], num_sampled=512, finish_reason="length") + say(24, [["b"]], num_sampled=300)
    found = next(one for one in find(made_up(cut, said={24: lasting})) if one.rule == "truncated")
    # One of ten in half of the limit: 1 - 0.9 ** 6 in the six halves from 512 to 2048.
    assert "Of 10 that were still going at token 256 in step 24, 1 ended by themselves" in found.meaning
    assert "47% of the others would within 2048 tokens" in found.meaning
    endless = say(24, [["a"] * 10], num_sampled=512, finish_reason="length")
    found = next(one for one in find(made_up(cut, said={24: endless})) if one.rule == "truncated")
    assert "does not follow" in found.meaning
