"""The page holds what the run's files say, whole or sampled, and nothing of it is markup or script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.errors import UserError
from grpo_cli.record.completions import completions_file
from grpo_cli.record.metrics import METRICS, is_own_metric
from grpo_cli.report import page_completions, page_data
from grpo_cli.report.page import as_json_block, report_page, run_labels, write_report
from grpo_cli.report.page_plots import EPISODES, GROUPS, LEARNING, LENGTHS, SAMPLER
from grpo_cli.report.run import read_run
from tests.report.run_folders import MadeUp, write_run


def page_of(*folders: Path) -> str:
    return report_page([read_run(folder) for folder in folders])


def block(page: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def line(page: str, title: str) -> dict[str, Any]:
    """The first line of a plot."""
    plots = [plot for section in block(page, "curves")["sections"] for plot in section["plots"]]
    return next(plot["lines"][0] for plot in plots if plot["title"] == title)


def test_every_metric_of_a_run_is_drawn_or_said_to_be_zero(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", MadeUp(turns=2, metrics={"mine": 2.0, "nothing": 0.0})))
    curves = page_data.Curves([run])
    sections = {section["title"]: section for section in curves.data()["sections"]}
    assert [plot["title"] for plot in sections["Other"]["plots"]] == ["mine"]
    assert sections["Other"]["zero"] == ["nothing"]
    assert [plot["title"] for plot in sections["Reward"]["plots"]] == ["Reward", "correct", "brief"]
    assert curves.notes() == []


def test_of_a_single_reward_function_there_is_one_plot(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", MadeUp(rewards=("only",))))
    sections = {section["title"]: section for section in page_data.Curves([run]).data()["sections"]}
    assert [plot["title"] for plot in sections["Reward"]["plots"]] == ["Reward"]
    assert "Other" not in sections


def test_a_curve_is_what_the_metrics_say(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page, run = page_of(folder), read_run(folder)
    reward = line(page, "Reward")
    assert block(page, "curves")["steps"][reward["x"]] == run.steps
    assert reward["y"] == pytest.approx(run.series("reward"), rel=1e-4)
    spread = [mean - std for mean, std in zip(run.series("reward"), run.series("reward_std"), strict=True)]
    assert reward["low"] == pytest.approx(spread, rel=1e-3)
    steps, values = run.points("eval_reward")
    held_out = line(page, "Held-out reward")
    assert block(page, "curves")["steps"][held_out["x"]] == steps
    assert held_out["y"] == pytest.approx(values, rel=1e-4)


def test_a_value_that_was_not_finite_is_a_gap_and_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = [json.loads(row) for row in (folder / METRICS).read_text().splitlines()]
    rows[3]["kl"] = None
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(folder)
    assert line(page, "KL")["y"][3] is None
    assert "not finite are gaps: kl (1 steps)" in page


def test_long_runs_are_binned_and_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", MadeUp(steps=2000, distinct_files=3)))
    entropy = line(page, "Entropy")
    assert len(entropy["y"]) == 500
    assert all(
        low <= mean <= high
        for low, mean, high in zip(*(entropy[part] for part in ("low", "y", "high")), strict=True)
    )
    assert "4 steps in a row are one point" in page
    stored = block(page, "completions")[0]
    assert len(stored) == 40
    assert (stored[0]["step"], stored[-1]["step"]) == (1, 2000)
    assert "40 of 2000 stored steps" in page


def test_completions_are_those_that_are_stored(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", MadeUp(prompts=2, extras={"parsed": 7}))
    step = block(page_of(folder), "completions")[0][4]
    stored = read_run(folder).completions(5)
    shown = [one for group in step["groups"] for one in group["completions"]]
    assert [one["said"] for one in shown] == [one.text for one in stored]
    assert [one["advantage"] for one in shown] == pytest.approx([one.advantage for one in stored], rel=1e-4)
    assert [dict(one["rewards"]) for one in shown] == [one.rewards for one in stored]
    assert shown[0]["extras"] == [["parsed", "7"]]
    pieces = shown[0]["pieces"]
    assert pieces["texts"] == stored[0].token_texts
    assert pieces["logprobs"] == [round(100 * value) for value in stored[0].logprobs]
    drift = [policy - own for policy, own in zip(stored[0].policy_logprobs, stored[0].logprobs, strict=True)]
    assert pieces["ratios"] == pytest.approx([1000 * (2.718281828**value - 1) for value in drift], abs=1)


def test_all_groups_are_there_until_they_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", MadeUp(steps=3, prompts=6))
    page = page_of(folder)
    assert [len(step["groups"]) for step in block(page, "completions")[0]] == [6, 6, 6]
    assert "Nothing: every step and every stored completion is here" in page
    monkeypatch.setattr(page_completions, "MAX_IN_WHOLE_STEPS", 71)
    page = page_of(folder)
    assert {len(step["groups"]) for step in block(page, "completions")[0]} <= {2, 3}
    assert "more than 71 completions: of a step with more than three groups" in page


def test_a_reward_weighs_what_the_recipe_says(tmp_path: Path) -> None:
    recipe = {"rewards": [{"path": "a:b", "name": "correct", "weight": 3.0}, {"path": "a:c", "name": "brief"}]}
    folder = write_run(tmp_path / "run", MadeUp(recipe=recipe))
    one = block(page_of(folder), "completions")[0][0]["groups"][0]["completions"][0]
    assert one["reward"] == pytest.approx(3 * dict(one["rewards"])["correct"] + dict(one["rewards"])["brief"])


def test_large_completions_are_thinned_until_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(write_run(tmp_path / "run", MadeUp(steps=40, prompts=8, tokens=900, distinct_files=3)))
    monkeypatch.setattr(page_completions, "MAX_BYTES", 1_000_000)
    completions = page_completions.Completions([run], ["run"])
    data = completions.data()
    assert len(as_json_block(data)) < 1_000_000
    assert [step["step"] for step in data[0]][:: len(data[0]) - 1] == [1, 40]
    notes = " ".join(completions.notes())
    assert f"{len(data[0])} of 40 stored steps" in notes
    assert "cut to 2000 characters" in notes
    assert "more than three groups" in notes


def test_a_run_that_died_has_a_page_of_what_it_left(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", MadeUp(is_finished=False))
    with (folder / METRICS).open("a") as file:
        file.write('{"step": 21, "rew')
    completions_file(folder, 5).write_bytes(b"PAR1")
    page = page_of(folder)
    assert "not finished" in page
    assert "step-000005.parquet cannot be read" in page
    assert len(block(page, "completions")[0]) == 19


def test_a_run_without_completions_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder / "completions")
    assert block(page_of(folder), "completions") == [[]]


def test_data_cannot_end_its_block() -> None:
    texts = ["</script>", "<!--", "]]>", "&lt;", "\u2028\u2029", "\x00", "\ud800"]
    written = as_json_block(texts)
    assert not set(written) & set("<>&\u2028\u2029")
    assert json.loads(written) == texts


def test_half_a_character_does_not_stop_the_page(tmp_path: Path) -> None:
    message = {"role": "user", "content": "\ud83d"}
    folder = write_run(tmp_path / "run", MadeUp(prompt=[message]))
    write_report([read_run(folder)], tmp_path / "page.html")
    assert "data-completions" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_policy_allows_the_page_and_no_more(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    policy = re.search(r'Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    allowed = policy[1].replace("&#39;", "'")
    assert "default-src 'none'" in allowed
    assert "unsafe" not in allowed
    assert "http:" not in allowed
    assert "https:" not in allowed
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert len(scripts) == 4
    assert re.search(r"script-src ([^;]*)", allowed)[1].split() == [f"'sha256-{digest}'" for digest in digests]
    tags = re.findall(r"<[^>]*>", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert not [tag for tag in tags if re.search(r"\s(style|on\w+|src|xlink)\w*=", tag)]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name)) for name in ("a/run", "b/run", "c")]
    assert run_labels(runs) == [str(tmp_path / "a/run"), str(tmp_path / "b/run"), "c"]


def test_what_is_left_out_is_told_of_each_run_by_its_label(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, MadeUp(steps=30, distinct_files=1)) for name in ("a/run", "b/run")]
    page = page_of(*folders)
    for folder in folders:
        assert f"{folder}: the completions of 20 of 30 stored steps are here" in page


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    out = tmp_path / "page.html"
    write_report([run], out)
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(UserError, match=r"missing/page.html cannot be written: No such file.*--out"):
        write_report([run], tmp_path / "missing" / "page.html")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path)


def test_the_time_is_that_of_steps_and_evaluations(tmp_path: Path) -> None:
    times = {"time/step": 50.0, "time/eval": 10.0}
    run = read_run(write_run(tmp_path / "run", MadeUp(steps=2, metrics=times)))
    run.rows[1]["num_tokens"] = float("nan")  # as Python's JSON may hold it
    page = report_page([run])
    assert "2 min 0 s" in page
    assert "1,000" in page


def test_every_metric_that_has_a_plot_of_its_own_is_one_that_runs_write() -> None:
    named = set().union(*(section.metrics for section in (LEARNING, LENGTHS, GROUPS, SAMPLER, EPISODES)))
    assert [name for name in named if not is_own_metric(name)] == []
