"""Each starting point that `grpo init` writes is whole: it passes `grpo check`, trains, and does what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grpo_cli.errors import UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.record.metrics import read_metrics
from grpo_cli.verbs.init import STARTS, init, start_files
from rewards.boxed import boxed_answer
from rewards.tasks import coding_reward
from tests.conftest import tiny_llama
from tests.episode.chat import chat_tokenizer
from tests.processes import ROOT, Command

FILES = {
    "keyword": ["recipe.yaml", "my_rewards.py", "prompts.jsonl"],
    "gsm8k": ["recipe.yaml", "held_out.jsonl", "my_rewards.py", "problems.jsonl"],
    "tools": ["recipe.yaml", "my_tools.py"],
    "code": ["recipe.yaml", "exercises.jsonl"],
    "game": ["recipe.yaml", "my_game.py"],
}

CHECKED = {
    "keyword": ["5 prompts (texts); columns for rewards: keyword", "mentions_keyword, weight 1: 0 for"],
    "gsm8k": ["16 prompts (chats)", "boxed_answer, weight 1: 0 for", "has_one_box, weight 0.1: 0 for"],
    "tools": [
        "400 prompts (chats)",
        "tool calculate",
        "Use the tool for every calculation.",
    ],
    "code": ["10 prompts (chats); columns for rewards: task, tests", "coding_reward, weight 1: -1 for"],
    "game": ["8 prompts (chats)", "Nim: reset(", "stones. Who takes the last one wins."],
}
"""What `grpo check` says of them, beside that they are fine."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose chat template knows tools."""
    folder = tmp_path_factory.mktemp("tiny-qwen")
    tokenizer = chat_tokenizer("qwen2_5")
    config = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 2048,
    }
    tiny_llama(**config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def grpo(*arguments: str, folder: Path) -> tuple[int, str]:
    """Exit code and output, from outside this repository: what is named must be installed or in the folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    process = Command(*arguments, environment=environment, folder=folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode is not None
    return process.returncode, output


def module(start: str, name: str) -> ModuleType:
    (path,) = (file for file in start_files(start) if file.name == f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{start}_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def rows(start: str, name: str) -> list[dict[str, Any]]:
    (path,) = (file for file in start_files(start) if file.name == name)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_starting_point_has_a_name_and_its_files() -> None:
    folders = {path.name for path in (ROOT / "grpo_cli" / "starts").iterdir() if path.name != "__pycache__"}
    assert folders == set(STARTS) == FILES.keys()
    assert {start: [path.name for path in start_files(start)] for start in STARTS} == FILES


@pytest.mark.parametrize("start", STARTS)
def test_what_init_writes_passes_check(start: str, model: Path, tmp_path: Path) -> None:
    chosen = [] if start == STARTS[0] else ["--from", start]
    code, output = grpo("init", "new/my experiment", *chosen, folder=tmp_path)
    assert code == 0, output
    assert output.splitlines() == [
        *(f"wrote new/my experiment/{name}" for name in FILES[start]),
        "next: cd 'new/my experiment' && grpo check recipe.yaml",
    ]
    folder = tmp_path / "new" / "my experiment"
    code, output = grpo("check", "recipe.yaml", "--set", f"model.name={model}", folder=folder)
    assert code == 0, output
    for said in (*CHECKED[start], "the recipe is fine"):
        assert said in output


@pytest.mark.slow
def test_each_trains_a_step(model: Path, tmp_path: Path) -> None:
    small = (
        "generation.num_generations=2",
        "train.prompts_per_step=2",
        "train.max_steps=1",
        "logging.trackers=[]",
    )
    for start in STARTS:
        init(tmp_path / start, start)
        overrides = [f"--set={override}" for override in (f"model.name={model}", *small)]
        code, output = grpo("train", "recipe.yaml", *overrides, folder=tmp_path / start)
        assert code == 0, f"{start}: {output}"
        run = tmp_path / start / load_recipe(tmp_path / start / "recipe.yaml").train.output_dir
        assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1], start
        assert (run / "final" / "model.safetensors").is_file(), start


def test_a_wrong_name_lists_the_right_ones_and_writes_nothing(tmp_path: Path) -> None:
    code, output = grpo("init", "new", "--from", "chess", folder=tmp_path)
    assert (code, output) == (
        2,
        "--from chess: there is no such start; choose one of keyword, gsm8k, tools, code, game\n",
    )
    assert not list(tmp_path.iterdir())


def test_init_into_a_folder_with_other_files_leaves_them_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    init(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", FILES["keyword"])
def test_init_never_writes_over_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} exists already; choose another folder"):
        init(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_init_into_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file: File exists"):
        init(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write to .*inside: Not a directory"):
        init(tmp_path / "file" / "inside")


# What each of them is about


def test_keyword_scores_as_it_says() -> None:
    score = module("keyword", "my_rewards").mentions_keyword
    assert score(["on jupiter", "no", "x"], ["Jupiter", "Paris", None], prompts=[]) == [1.0, 0.0, None]


def test_the_problems_of_gsm8k_are_in_its_format_and_their_sums_are_right() -> None:
    golden = ROOT / "tests" / "golden" / "gsm8k" / "train.jsonl"
    its_keys = json.loads(golden.read_text(encoding="utf-8").splitlines()[0]).keys()
    for row in [*rows("gsm8k", "problems.jsonl"), *rows("gsm8k", "held_out.jsonl")]:
        assert row.keys() == its_keys
        *steps, last = row["answer"].split("\n")
        answer = last.removeprefix("#### ")
        assert answer != last
        sums = re.findall(r"<<([-+*/(). 0-9]+)=([.0-9]+)>>\2", "\n".join(steps))
        for left, right in sums:
            assert eval(left) == pytest.approx(float(right))
        assert float(sums[-1][1]) == float(answer.replace(",", ""))
        box = [{"role": "assistant", "content": rf"\boxed{{{answer}}}"}]
        assert boxed_answer([box], [row["answer"]]) == [1.0]
        assert module("gsm8k", "my_rewards").has_one_box([box, [*box, *box], [{"content": "7"}]]) == [1, 1, 0]


def test_gsm8k_itself_is_two_lines_of_its_recipe_away() -> None:
    (path, *_) = start_files("gsm8k")
    text = path.read_text(encoding="utf-8")
    assert "#   name: openai/gsm8k\n  #   config: main\n" in text
    recipe = load_recipe(path, ["data.name=openai/gsm8k", "data.config=main"])
    assert recipe.data.columns == {"question": "prompt", "answer": "ground_truth"}


def test_the_tool_calculates_and_bears_what_a_model_may_ask() -> None:
    calculate = module("tools", "my_tools").calculate
    assert [calculate(7, operation, 2) for operation in "+-*/"] == ["9", "5", "14", "3.5"]
    assert calculate(1e15, "+", 0.0) == "1000000000000000"
    for wrong in ((1, "/", 0), (1e300, "*", 1e300), (float("inf"), "-", float("inf")), (1, "^", 2)):
        with pytest.raises(ValueError, match=r"division by zero|too large|there is no operation"):
            calculate(*wrong)


def test_questions_of_the_tool_are_answered_with_it_and_repeat_with_their_seed() -> None:
    tools = module("tools", "my_tools")
    made = tools.questions(20, seed=1)
    assert made == tools.questions(20, seed=1) != tools.questions(20, seed=2)
    for row in made:
        boxes, pieces, taken = map(float, re.findall(r"\d+", row["prompt"]))
        product = float(tools.calculate(boxes, "*", pieces))
        assert tools.calculate(product, "-", taken) == row["ground_truth"]


SOLUTIONS = """
initials = lambda name: "".join(word[0].upper() for word in name.split())
running_total = lambda numbers: [sum(numbers[: end + 1]) for end in range(len(numbers))]
is_leap_year = lambda year: year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
second_largest = lambda numbers: sorted(set(numbers))[-2] if len(set(numbers)) > 1 else None
count_words = lambda text: {word: text.lower().split().count(word) for word in text.lower().split()}
to_binary = lambda n: format(n, "b")
flatten = lambda rows: [entry for row in rows for entry in row]
caesar = lambda text, shift: "".join(
    chr((ord(c) - 97 + shift) % 26 + 97) if "a" <= c <= "z" else c for c in text
)
longest_run = lambda text: max((end - start for end in range(len(text) + 1) for start in range(end)
                                if len(set(text[start:end])) == 1), default=0)
common = lambda a, b: sorted(set(a) & set(b))
"""


def test_every_exercise_can_be_solved_and_not_by_doing_nothing() -> None:
    exercises = rows("code", "exercises.jsonl")
    asked = [re.findall(r"`(\w+)\(", row["prompt"])[0] for row in exercises]
    nothing = "\n".join(f"def {name}(*_): return None" for name in asked)
    columns = {"task": [row["task"] for row in exercises], "tests": [row["tests"] for row in exercises]}
    assert coding_reward([SOLUTIONS] * len(exercises), **columns) == [1.0] * len(exercises)
    assert coding_reward([nothing] * len(exercises), **columns) == [-1.0] * len(exercises)


def test_a_game_is_won_by_who_takes_the_last_stone_and_begins_alike_with_a_seed() -> None:
    game = module("game", "my_game").Nim(fewest=3, most=3)
    assert game.reset(seed=1).startswith("There are 3 stones.")
    assert game.respond(" 3.") is None
    assert game.get_reward() == 1.0
    game.reset(seed=1)
    assert "That is no move. There are 3 stones." in game.respond("4")
    assert "That is no move" in game.respond("I take 3")
    assert game.respond("3") is None
    assert game.get_reward() == pytest.approx(0.9 + 0.1 / 3)
    assert game.reset(seed=7) == game.reset(seed=7)


def test_every_game_ends_and_one_that_is_lost_rewards_the_moves_only() -> None:
    game = module("game", "my_game").Nim(fewest=5, most=12)
    rewards = []
    for seed in range(200):
        game.reset(seed=seed)
        turns = next(turn for turn in range(1, 9) if game.respond("1") is None)
        assert turns <= load_recipe(start_files("game")[0]).episode.max_turns  # type: ignore[union-attr]
        assert game.stones == 0
        rewards.append(round(game.get_reward(), 6))
    assert set(rewards) == {0.1, 1.0}
