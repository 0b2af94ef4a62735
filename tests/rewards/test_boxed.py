import pytest

from rewards.boxed import boxed_answer, last_boxed, normalise_answer


def score(completion, ground_truth):
    (reward,) = boxed_answer(completions=[completion], ground_truth=[ground_truth], prompts=["p"])
    return reward


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{72}", "72"),
        (r"\fbox{72}", "72"),
        (r"\boxed {72}", "72"),
        (r"\boxed{1}, no, \boxed{2}.", "2"),
        (r"\boxed{1} or \fbox{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} }", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{日本}", "日本"),
        ("", None),
        ("72", None),
        (r"\boxed 72", None),
        (r"\boxed{72", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{72\}", None),
        ("\\boxed{72\\", None),
        (r"\boxed{1} and finally \boxed{2", None),
        (r"\boxedin{72}", None),
    ],
)
def test_the_last_box_is_found(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("72", "72"),
        (" 72 ", "72"),
        ("$72$", "72"),
        (r"\$72", "72"),
        ("72.", "72"),
        ("$72.$", "72"),
        ("72.0", "72"),
        ("72", "72.00"),
        (".5", "0.50"),
        ("+7", "7"),
        ("-0.0", "0"),
        ("007", "7"),
        ("1,234,567", "1234567"),
        ("1{,}234.50", "1234.5"),
        ("1,000", "1,000.0"),
        (r"\text{Monday}", "Monday"),
        (r"\text{ New  York }", "New York"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac12"),
        ("x + 1", "x+1"),
        (r"\frac{1} { 2 }", r"\frac{1}{2}"),
        ("(1,\n 2)", "(1, 2)"),
        ("é ✓", "é✓"),
    ],
)
def test_differences_of_writing_are_forgiven(answer, truth):
    assert score(f"so \\boxed{{{answer}}}", truth) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("73", "72"),
        ("-72", "72"),
        ("7 2", "72"),
        ("1,23", "123"),
        ("(1,234)", "(1234)"),
        ("0.5", "1/2"),
        ("12345678901234567890123456789012", "12345678901234567890123456789013"),
        ("0.10000000000000000001", "0.1"),
        ("New York", "NewYork"),
        (r"\pi r", r"\pir"),
        ("", ""),
        (".", ""),
    ],
)
def test_differences_of_value_are_not(answer, truth):
    assert score(f"so \\boxed{{{answer}}}", truth) == 0.0


def test_no_box_is_no_answer():
    assert score("72", "72") == 0.0
    assert score("", "72") == 0.0
    assert score(r"\boxed{72} or rather \boxed{72", "72") == 0.0


def test_a_gsm8k_solution_is_its_last_line():
    solution = "In May she sold 48/2 = <<48/2=24>>24.\n48+24 = <<48+24=72>>72\n#### 1,072"
    assert score(r"\boxed{1072}", solution) == 1.0
    assert score(r"\boxed{24}", solution) == 0.0


def test_a_number_is_a_ground_truth_too():
    assert score(r"\boxed{72}", 72) == 1.0
    assert score(r"\boxed{72}", 72.0) == 1.0


def test_without_a_ground_truth_the_reward_does_not_apply():
    completions = [r"\boxed{1}", [{"role": "assistant", "content": r"\boxed{2}"}], r"\boxed{3}"]
    assert boxed_answer(completions=completions, ground_truth=[None, "2", "4"]) == [None, 1.0, 0.0]


def test_a_column_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="'ground_truth' has 1 entries for 2 completions"):
        boxed_answer(completions=["a", "b"], ground_truth=["1"])


def test_normalising_twice_changes_nothing_more():
    for answer in ("$\\text{$1,000.$}$", "-0", "..", "\\$", r"\text{\text{a}}", "1 , 000"):
        once = normalise_answer(answer)
        assert normalise_answer(once) == once
