import pytest

from rewards.format import think_answer_format


def score(completion):
    (reward,) = think_answer_format(completions=[completion], prompts=["p"])
    return reward


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>b</answer>",
        "\n <think>\nfirst\n\nsecond\n</think>\n\n<answer>\n72\n</answer>\n",
        "<think>1 < 2 and 3 > 2, <b>surely</b></think><answer>é✓</answer>",
    ],
)
def test_the_form_is_rewarded(text):
    assert score(text) == 1.0
    assert score([{"role": "assistant", "content": text}]) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "72",
        "<think>a</think>",
        "<answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "<think></think><answer>b</answer>",
        "<think>a</think><answer> \n </answer>",
        "Sure! <think>a</think><answer>b</answer>",
        "<think>a</think> so <answer>b</answer>",
        "<think>a</think><answer>b</answer> Done.",
        "<think>a<answer>b</answer></think>",
        "<think>a</think><answer>b",
        "<think>a</think><think>b</think><answer>c</answer>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a <think>b</think></think><answer>c</answer>",
        "<THINK>a</THINK><answer>b</answer>",
    ],
)
def test_any_other_form_is_not(text):
    assert score(text) == 0.0


def test_endless_tags_take_no_time():
    assert score("<think>" * 50_000 + "</think><answer>" * 50_000) == 0.0
