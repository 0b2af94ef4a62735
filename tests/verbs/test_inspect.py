"""`grpo inspect` shows what a run has stored of a step, in a terminal or a file, and without torch."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

import grpo_cli
from grpo_cli.cli import app
from grpo_cli.errors import UserError
from grpo_cli.record.completions import EXTRA_COLUMN, POLICY_LOGPROBS, TOKEN_TEXTS, completions_file
from grpo_cli.report.run import read_run
from grpo_cli.report.tokens import token_losses, token_ratios
from grpo_cli.verbs.inspect import LIKELY, inspect
from tests.conftest import byte_tokenizer, tiny_llama
from tests.episode.small_talk import small_talk
from tests.processes import ROOT

WRITES = {"prompt": "[red]question[/red] \x1b[31m :smile:"}
"""What a terminal, Rich's markup and its names of emoji would act on."""

SHORT, VARIED = "reward_len", "reward_num_unique_chars"

RAREST = "\x1b[1;37;41m"
"""Bold white on red, to a terminal."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of three groups, with two reward functions and two iterations."""
    folder = tmp_path_factory.mktemp("inspect")
    recipe: dict[str, Any] = {
        "model": {"name": "tiny"},
        "rewards": [f"rewards.length:{SHORT}", {"path": f"rewards.diversity:{VARIED}", "weight": 2}],
        "generation": {"num_generations": 4, "max_completion_tokens": 8},
        "optim": {"learning_rate": 1e-3},
        "train": {
            "output_dir": str(folder / "run"), "max_steps": 2, "prompts_per_step": 3, "num_iterations": 2,
        },
        "logging": {"trackers": []},
    }  # fmt: skip
    model = tiny_llama(eos_token_id=[256, *range(0, 256, 8)])
    grpo_cli.train(recipe, model=model, tokenizer=byte_tokenizer(), train_data=[WRITES] * 6)
    return folder / "run"


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A step of episodes, by whether the chat template writes their history anew."""
    folder = tmp_path_factory.mktemp("talks")
    for rewrites in (False, True):
        recipe = small_talk(folder / f"model-{rewrites}", folder / f"run-{rewrites}", rewrites=rewrites)
        recipe["train"]["max_steps"] = 1
        grpo_cli.train(recipe)
    return {rewrites: folder / f"run-{rewrites}" for rewrites in (False, True)}


def shown(run: Path, step: int | None = None, group: int | None = None, **terminal: Any) -> str:
    screen = io.StringIO()
    inspect(run, step, group, Console(file=screen, **({"width": 200} | terminal)))
    return screen.getvalue()


def coloured(run: Path, step: int, group: int) -> str:
    return shown(run, step, group, force_terminal=True, color_system="standard", no_color=False)


def test_a_step_has_a_row_for_each_group(run: Path) -> None:
    output = shown(run, 1).splitlines()
    completions = read_run(run).completions(1)
    assert output[0].startswith("run, step 1  reward ")
    *rows, hint = output[-4:]
    assert hint == f"one group: grpo inspect {run} --step 1 --group 0"
    for place, row in enumerate(rows):
        group = completions[4 * place : 4 * place + 4]
        scores = [
            [one.rewards[name] or 0.0 for one in group] for name in ("reward_len", "reward_num_unique_chars")
        ]
        totals = [first + 2 * second for first, second in zip(*scores, strict=True)]
        means = [sum(of_function) / 4 for of_function in scores]
        assert row.split()[0] == str(place)
        *_, mean, low, high, _, first, second, _, _, trained = row.split()
        numbers = [float(number) for number in (mean, low, high, first, second)]
        assert numbers == pytest.approx([sum(totals) / 4, min(totals), max(totals), *means], rel=5e-3)
        assert trained == "yes"


def test_the_last_step_that_is_stored_is_shown_if_none_is_asked_for(run: Path) -> None:
    assert shown(run) == shown(run, 2)


def test_a_narrow_terminal_is_not_exceeded(run: Path) -> None:
    output = shown(run, 1, width=80, force_terminal=True, color_system=None)
    assert max(map(len, output.splitlines()[1:-1])) <= 80
    assert "reward_num" not in output


def test_a_group_is_its_prompt_and_its_completions(run: Path) -> None:
    output = shown(run, 1, 2)
    group = read_run(run).completions(1)[8:12]
    assert WRITES["prompt"].replace("\x1b", "\ufffd") in output
    facts = [line for line in output.splitlines() if line.startswith("reward ")]
    for one, line in zip(group, facts, strict=True):
        scores = ", ".join(f"{name} {score:.3g}" for name, score in one.rewards.items())
        end = f"advantage {one.advantage:+.3g}  ended by {one.finish_reason}  {one.num_sampled} tokens"
        assert line.endswith(f" ({scores})  {end}")


def test_the_tokens_of_the_largest_ratio_and_loss_are_listed(run: Path) -> None:
    """Of the second of two iterations, in which there are ratios other than 1."""
    completion, config = read_run(run).completions(1)[8], read_run(run).recipe.loss
    drifts = [abs(math.log(ratio)) for ratio in token_ratios(completion) if ratio is not None]
    losses = [loss for loss in token_losses(completion, config) if loss is not None]
    assert len(drifts) == len(losses) == len(completion.token_ids)
    of_first = shown(run, 1, 2).partition("completion 1")[0]
    for title, sizes in (("farthest from what sampled them", drifts), ("largest loss", losses)):
        rows = of_first.partition(title)[2].splitlines()[2:7]
        wanted = sorted(range(len(sizes)), key=lambda place: -sizes[place])[:5]
        assert [int(row.split()[0]) for row in rows[: len(wanted)]] == wanted


def test_nothing_that_was_written_acts_on_the_terminal(run: Path) -> None:
    for group in (None, 0, 1, 2):
        plain = shown(run, 1, group)
        assert "\x1b" not in plain
        assert all(character.isprintable() for line in plain.split("\n") for character in line)
        assert "[red]question[/red]" in plain
        assert ":smile:" in plain
    assert "\x1b[31m :smile:" not in coloured(run, 1, 0)


def test_tokens_are_coloured_and_a_legend_says_how(run: Path) -> None:
    least = min(value for one in read_run(run).completions(1)[:4] for value in one.logprobs if value is not None)
    assert math.exp(least) < LIKELY[-2][0]
    legend, _, tokens = coloured(run, 1, 0).partition("prompt")
    assert "probability when sampled:" in legend
    assert RAREST in legend
    assert RAREST in tokens
    assert "probability when sampled:" not in shown(run, 1, 0)


@pytest.mark.parametrize("rewrites", [False, True])
def test_an_episode_shows_its_turns_and_answers(talks: dict[bool, Path], rewrites: bool) -> None:
    output = shown(talks[rewrites], 1, 1)
    for one in read_run(talks[rewrites]).completions(1)[4:8]:
        assert not isinstance(one.completion, str)
        turns = [message for message in one.completion if message["role"] == "assistant"]
        assert f"{one.num_sampled} tokens  {len(turns)} turn{'s' * (len(turns) > 1)}  0 tool calls" in output
        for message in one.completion:
            if message["role"] == "user":
                assert message["content"] in output
    assert ("its last turn, before which the chat template wrote the history anew" in output) == rewrites
    assert "ratio of policy to sampler: 1 for all tokens" in output


def test_what_was_not_trained_on_says_so(run: Path, tmp_path: Path) -> None:
    copy = older(run, tmp_path, [POLICY_LOGPROBS])
    assert [line.split()[-1] for line in shown(copy, 1).splitlines()[-4:-1]] == ["no"] * 3
    assert shown(copy, 1, 0).count("not trained on") == 4


def test_what_the_engine_did_not_tell_is_not_known(run: Path, tmp_path: Path) -> None:
    output = shown(older(run, tmp_path, ["logprobs"]), 1, 0)
    assert output.count("not known, since the engine told no log-probabilities") == 4
    assert "largest loss" not in output


def test_a_listed_token_is_written_so_that_it_can_be_told_from_others(run: Path, tmp_path: Path) -> None:
    copy = older(run, tmp_path, [])
    table = pq.read_table(completions_file(copy, 1))
    texts = pa.array([["\t"] * len(ids) for ids in table["completion_ids"].to_pylist()])
    column = table.column_names.index(TOKEN_TEXTS)
    pq.write_table(table.set_column(column, TOKEN_TEXTS, texts), completions_file(copy, 1))
    assert r"'\t'" in shown(copy, 1, 2)


def test_no_number_is_minus_zero(run: Path, tmp_path: Path) -> None:
    copy = older(run, tmp_path, [])
    table = pq.read_table(completions_file(copy, 1))
    column = table.column_names.index("advantage")
    nothing = pa.array([-0.0] * len(table))
    pq.write_table(table.set_column(column, "advantage", nothing), completions_file(copy, 1))
    output = shown(copy, 1, 0)
    assert output.count("advantage +0 ") == output.count("loss: 0 of each token") == 4


def test_a_completion_that_began_otherwise_than_its_group_shows_its_own_prompt(run: Path, tmp_path: Path) -> None:
    copy = older(run, tmp_path, [])
    table = pq.read_table(completions_file(copy, 1))
    prompts = pa.array(["one", "one", "another", "one"] * 3)
    column = table.column_names.index("prompt")
    pq.write_table(table.set_column(column, "prompt", prompts), completions_file(copy, 1))
    assert re.findall(r"── (completion \d) ──\nafter (.*)\n", shown(copy, 1, 0)) == [("completion 2", "another")]


def test_what_reward_functions_have_logged_is_shown(run: Path, tmp_path: Path) -> None:
    copy = older(run, tmp_path, [])
    table = pq.read_table(completions_file(copy, 1))
    answers = pa.array([f"\x1b{place}" for place in range(len(table))])
    pq.write_table(table.append_column(EXTRA_COLUMN.format(name="answer"), answers), completions_file(copy, 1))
    assert "answer: \ufffd5\n" in shown(copy, 1, 1)


def older(run: Path, folder: Path, without: list[str]) -> Path:
    """A copy of a run's record without some columns of its first step."""
    copy = folder / "older"
    (copy / "completions").mkdir(parents=True)
    for name in ("recipe.yaml", "metrics.jsonl"):
        (copy / name).write_bytes((run / name).read_bytes())
    table = pq.read_table(completions_file(run, 1)).drop_columns(without)
    pq.write_table(table, completions_file(copy, 1))
    return copy


def test_a_run_of_an_older_version_shows_texts_and_says_so(run: Path, tmp_path: Path) -> None:
    copy = older(run, tmp_path, [TOKEN_TEXTS, POLICY_LOGPROBS])
    output = shown(copy, 1, 0)
    assert "An older version stored these completions" in output
    assert "largest loss" not in output
    assert [line.split()[-1] for line in shown(copy).splitlines()[-4:-1]] == ["?"] * 3


def test_a_run_that_stored_no_tokens_at_all_is_of_an_older_version(run: Path, tmp_path: Path) -> None:
    ids = ["prompt_ids", "completion_ids", "logprobs"]
    copy = older(run, tmp_path, [TOKEN_TEXTS, POLICY_LOGPROBS, *ids])
    assert "An older version stored these completions" in shown(copy, 1, 0)
    assert [line.split()[-1] for line in shown(copy, 1).splitlines()[-4:-1]] == ["?"] * 3


def test_steps_and_groups_that_there_are_not_end_with_what_there_is(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--step 7: .*run has stored steps 1 to 2$"):
        inspect(run, 7, None, Console(quiet=True))
    with pytest.raises(UserError, match=r"--group 3: step 2 of .*run has groups 0 to 2$"):
        inspect(run, None, 3, Console(quiet=True))
    with pytest.raises(UserError, match="is not the folder of a run"):
        inspect(tmp_path, None, None, Console(quiet=True))
    copy = older(run, tmp_path, [])
    completions_file(copy, 1).unlink()
    with pytest.raises(UserError, match="no completions are stored"):
        inspect(copy, None, None, Console(quiet=True))


def test_the_command_line_shows_the_same(run: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(run), "--step", "1", "--group", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.splitlines()[0] == shown(run, 1, 2).splitlines()[0]


def test_what_the_terminal_cannot_show_ends_nothing(run: Path) -> None:
    command = [sys.executable, "-m", "grpo_cli.cli", "inspect", str(run), "--step", "1", "--group", "0"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "?? prompt ??" in done.stdout


def test_neither_torch_nor_pandas_is_imported(run: Path) -> None:
    check = (
        "import sys; from pathlib import Path; from rich.console import Console; "
        "from grpo_cli.verbs.inspect import inspect; "
        f"inspect(Path({str(run)!r}), None, 0, Console()); "
        "print('imported', [name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported []"
