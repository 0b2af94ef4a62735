import subprocess
import sys

from rewards.length import reward_len, reward_longer


def test_twenty_characters_are_the_best_length():
    completions = ["", "x" * 19, "x" * 20, "x" * 25]
    assert reward_len(completions=completions, prompts=["p"] * 4) == [-20.0, -1.0, 0.0, -5.0]


def test_longer_completions_get_more():
    assert reward_longer(completions=["", "abc", "é✓"], prompts=["p"] * 3) == [0.0, 3.0, 2.0]


def test_messages_count_like_their_text():
    completions = [[{"role": "assistant", "content": "x" * 18}]]
    assert reward_len(completions=completions, completion_ids=[[1]], task=["math"]) == [-2.0]
    assert reward_longer(completions=completions, completion_ids=[[1]], task=["math"]) == [18.0]


def test_importing_a_simple_reward_imports_nothing_heavy():
    code = "import sys, rewards.length, rewards.tasks; print({'torch', 'sympy', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
