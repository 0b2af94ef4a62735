import threading
import time

import pytest

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import RewardConfig
from grpo_cli.reward.registry import resolve_rewards
from rewards import sandbox
from rewards.tasks import coding_reward, math_reward, python_block

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"


def fenced(code, language="python"):
    return f"Here it is:\n```{language}\n{code}\n```\nDone."


def score_math(completion, ground_truth):
    (reward,) = math_reward(completions=[completion], task=["math"], ground_truth=[ground_truth], prompts=["p"])
    return reward


def score_code(completion, tests=TESTS):
    (reward,) = coding_reward(completions=[completion], task=["code"], tests=[tests], prompts=["p"])
    return reward


def test_equal_answers_are_right_however_they_are_written():
    pairs = [
        (r"\boxed{0.5}", "1/2"),
        ("so it is 1/2", "0.5"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"$\dfrac{2}{4}$", r"$\frac{1}{2}$"),
        (r"\boxed{\frac{1}{\sqrt 2}}", r"\sqrt{2}/2"),
        (r"\boxed{1 + x}", "x+1"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}"),
        ("The answer is 1,000.", "1000"),
        (r"\boxed{72}", "She sold 48+24 = 72.\n#### 72"),
        (r"\boxed{72}", 72),
        (r"\boxed{72}", "72."),
        (r"no \boxed{\text{Monday}}", r"\text{Monday}"),
    ]
    rewards = math_reward(
        completions=[completion for completion, _ in pairs],
        ground_truth=[truth for _, truth in pairs],
        task=["math"] * len(pairs),
    )
    assert [pair for pair, reward in zip(pairs, rewards, strict=True) if reward != 1.0] == []


@pytest.mark.parametrize(
    "completion", ["", "no idea", r"\boxed{}", r"\boxed{4}", r"\boxed{1}, \boxed{2}, \boxed{3}", "✓"]
)
def test_a_wrong_or_missing_answer_is_minus_one(completion):
    assert score_math(completion, "3") == -1.0


def test_rows_of_other_tasks_are_none_and_need_no_answer():
    rewards = math_reward(
        completions=[r"\boxed{1}", "print(1)", [{"role": "assistant", "content": r"\boxed{2}"}]],
        task=["math", "code", "math"],
        ground_truth=["2", None, "2"],
    )
    assert rewards == [-1.0, None, 1.0]
    assert math_reward(completions=["a"], task=["code"]) == [None]
    assert math_reward(completions=[], task=[]) == []


def test_math_works_from_a_worker_thread():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(score_math(r"\boxed{0.5}", "1/2")))
    thread.start()
    thread.join(60)
    assert rewards == [1.0]


def test_math_rows_without_the_column_are_an_error_that_names_it():
    with pytest.raises(ValueError, match="'ground_truth'"):
        math_reward(completions=["a"], task=["math"])


@pytest.mark.parametrize("truth", [None, "", "solved it ####"])
def test_a_math_row_without_a_ground_truth_is_an_error_that_names_it(truth):
    with pytest.raises(ValueError, match=r"row 1 .*ground_truth"):
        math_reward(completions=["a", "b"], task=["math", "math"], ground_truth=["1", truth])


@pytest.mark.parametrize("column", ["task", "ground_truth"])
def test_a_column_of_another_length_is_an_error_that_names_it(column):
    columns = {"task": ["math"], "ground_truth": ["1"]}
    columns[column] = columns[column] * 2
    with pytest.raises(ValueError, match=f"'{column}' has 2 entries for 1 completions"):
        math_reward(completions=["a"], **columns)


@pytest.mark.parametrize("completion", [fenced(ADD), ADD, [{"role": "assistant", "content": fenced(ADD, "py")}]])
def test_a_correct_program_passes(completion):
    assert score_code(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "I cannot do that.",
        fenced("def add(a, b):\n    return a - b"),
        fenced("def add(a, b:"),
        fenced(ADD + "raise ValueError"),
        "def add(a, b): return 'é\0'",
    ],
)
def test_a_wrong_program_is_minus_one(completion):
    assert score_code(completion) == -1.0


@pytest.mark.parametrize(
    "trick",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import sys, os; sys.excepthook = lambda *_: os._exit(0)",
        "import atexit, os; atexit.register(os._exit, 0)",
        "def add(a, b): import os; os._exit(0)",
        "x = '''",
        "print('finished')",
    ],
)
def test_exit_before_the_tests_is_not_a_pass(trick):
    assert score_code(fenced(trick)) == -1.0


def test_every_test_of_a_list_must_pass():
    assert score_code(fenced(ADD), TESTS.split("\n")) == 1.0
    assert score_code(fenced(ADD), ["assert add(1, 2) == 3", "assert add(1, 2) == 4"]) == -1.0
    assert score_code(fenced(ADD), ["assert add(1, 2) == 4", "assert add(1, 2) == 3"]) == -1.0


def test_rows_run_side_by_side_and_keep_their_order():
    slow = "import time; time.sleep(1.2)\n" + ADD
    start = time.monotonic()
    rewards = coding_reward(
        completions=[slow, "no", "72", slow],
        task=["code", "code", "math", "code"],
        tests=[TESTS, TESTS, None, [TESTS]],
    )
    assert rewards == [1.0, -1.0, None, 1.0]
    assert time.monotonic() - start < 2.4


def test_a_sandbox_that_is_required_and_missing_is_an_error_before_the_run(monkeypatch):
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: "bubblewrap is not installed")
    config = RewardConfig(path="rewards.tasks:coding_reward", params={"sandbox": "required"})
    with pytest.raises(UserError, match=r"rewards\.0: .*sandbox: required, but bubblewrap is not installed"):
        resolve_rewards([config])
    with pytest.raises(UserError, match="sandbox can be auto or required, not 'on'"):
        resolve_rewards([RewardConfig(path="coding", params={"sandbox": "on"})])


def test_without_a_sandbox_there_is_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: "bubblewrap is not installed")
    sandbox._warn.cache_clear()
    resolve_rewards([RewardConfig(path="coding")])
    assert score_code(fenced(ADD)) == score_code(ADD) == 1.0
    (warning,) = caplog.messages
    assert "runs as your user" in warning
    assert "Bubblewrap is not installed" in warning


def test_with_a_sandbox_there_is_no_warning(caplog):
    if isinstance(sandbox.bubblewrap(), str):
        pytest.skip(sandbox.bubblewrap())
    (function,) = resolve_rewards([RewardConfig(path="coding", params={"sandbox": "required"})])
    assert function.call(completions=[ADD], task=["code"], tests=[TESTS]) == [1.0]
    assert caplog.messages == []


def test_code_rows_without_the_column_are_an_error_that_names_it():
    with pytest.raises(ValueError, match="'tests'"):
        coding_reward(completions=["a"], task=["code"])
    assert coding_reward(completions=["a"], task=["math"]) == [None]


@pytest.mark.parametrize("tests", [None, "", [], [" "]])
def test_a_code_row_without_tests_is_an_error_that_names_it(tests):
    with pytest.raises(ValueError, match=r"row 1 .*tests"):
        coding_reward(completions=["a", "b"], task=["math", "code"], tests=[None, tests])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        (fenced("x = 1"), "x = 1"),
        (fenced("x = 1", "Python"), "x = 1"),
        (fenced("x = 1", " python3 title=a.py"), "x = 1"),
        (fenced("x = 1", ""), "x = 1"),
        (fenced("x = 1") + fenced("x = 2"), "x = 2"),
        (fenced("x = 1") + "It prints:\n" + fenced("1", ""), "x = 1"),
        (fenced("ls", "bash"), fenced("ls", "bash")),
        (fenced("ls", "bash") + fenced("x = 1"), "x = 1"),
        ("- so:\n  ```python\n  if x:\n      y\n  ```", "if x:\n    y"),
        ("```python\nx = 1", "x = 1"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("~~~python\nx = 1\n~~~", "x = 1"),
        ("```python\n```", ""),
    ],
)
def test_the_program_is_the_last_python_block(text, code):
    assert python_block(text) == code
