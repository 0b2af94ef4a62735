"""A run in wandb and trackio, by their own packages: without a network, and read back from what they keep."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import grpo_cli
from grpo_cli.errors import RunError, UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.record.completions import StoredCompletion, read_completions
from grpo_cli.train import tracked_run
from grpo_cli.train.tracked_run import completions_table
from grpo_cli.train.trackers import Trackers, check_trackers
from tests.train.wandb_file import Offline, offline_run

COLUMNS = ["step", "prompt", "completion", "reward/letters", "advantage", "extra/first"]


def letters(completions: list[str], log_extra: Any) -> list[float]:
    log_extra("first", [completion[:1] for completion in completions])
    return [float(sum(map(str.isalpha, completion))) for completion in completions]


class FailsAt:
    """Ends a run before a step is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: Any) -> None:
        if state.step == self.step:
            raise RuntimeError("the power is gone")


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Four steps, a checkpoint after every second, and a table."""
    tiny_recipe["train"] |= {"max_steps": 4, "save_every": 2}
    tiny_recipe["logging"] = {"print_completions": 2, "project": "of-a-test"}
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return tiny_recipe


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    package = pytest.importorskip("wandb")
    for hooked in ("exit", "excepthook"):  # wandb leaves its own in their place
        monkeypatch.setattr(sys, hooked, getattr(sys, hooked))
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    package.teardown()  # what it knows of the environment is from before
    yield package
    package.teardown()


@pytest.fixture(scope="module")
def trackio(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))  # it is read when the package is imported
    return pytest.importorskip("trackio")


def train(recipe: dict[str, Any], tracker: str, **options: Any) -> tuple[Any, str]:
    """The result, and what the run has shown."""
    recipe["logging"]["trackers"] = [tracker]
    screen = io.StringIO()
    result = grpo_cli.train(recipe, rewards=[letters], console=Console(file=screen, width=1000), **options)
    return result, screen.getvalue()


def die_after_step_3(recipe: dict[str, Any], tracker: str) -> Path:
    """The last checkpoint is of step 2."""
    with pytest.raises(RunError, match="the power is gone"):
        train(recipe, tracker, callbacks=[FailsAt(4)])
    return Path(recipe["train"]["output_dir"])


def started(wandb: Any, folder: Path) -> Offline:
    """What wandb has kept of the last start, in a place of its own: its folders are named by the second."""
    wandb.teardown()  # what it writes is in the file once its process has ended
    place = folder / f"start-{len(list(folder.glob('start-*')))}"
    (folder / "wandb").rename(place)
    return offline_run(place)


def rewards_of(result: Any) -> list[tuple[int, float]]:
    return [(row["step"], pytest.approx(row["reward"])) for row in result.metrics]


@pytest.mark.slow
def test_wandb_has_a_resumed_run_once_with_its_recipe_tables_and_report(
    wandb: Any, recipe: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    first = started(wandb, die_after_step_3(recipe, "wandb"))
    result, shown = train(recipe, "wandb", resume=True)
    second = started(wandb, result.output_dir)
    assert (first.run_id, first.project, first.name) == (second.run_id, "of-a-test", result.output_dir.name)
    assert first.series("reward") + second.series("reward") == rewards_of(result)
    assert [len(one.series("step")) for one in (first, second)] == [3, 1]
    config = {key: value for key, value in second.config.items() if key != "_wandb"}
    assert load_recipe(config) == load_recipe(result.output_dir / "recipe.yaml")
    assert [one.exit_code for one in (first, second)] == [1, 0]
    assert reports(first) == []
    assert [result.output_dir.name in page for page in reports(second)] == [True]
    for one, step in ((first, 2), (second, 4)):
        table = one.table(step)
        assert table["columns"] == COLUMNS
        assert table["data"] == completions_table(read_completions(result.output_dir, step, 2))[1]
    assert (
        f"wandb: kept on this machine; `wandb sync {result.output_dir}/wandb/{second.folder.name}` sends it"
        in shown
    )
    assert not [text for text in capfd.readouterr() if "wandb" in text]


def reports(run: Offline) -> list[str]:
    artifacts = [one for one in run.artifacts if one.type == "report"]
    assert all(one.name == f"report-{run.run_id}" for one in artifacts)
    entries = [entry for one in artifacts for entry in one.manifest.contents]
    assert all(entry.path == "report.html" for entry in entries)
    return [Path(entry.local_path).read_text(encoding="utf-8") for entry in entries]


def test_trackio_has_a_resumed_run_once_with_its_recipe_tables_and_report(
    trackio: Any, recipe: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    die_after_step_3(recipe, "trackio")
    result, shown = train(recipe, "trackio", resume=True)
    assert not [text for text in capfd.readouterr() if "* " in text]
    with pytest.raises(RuntimeError):  # no run is open, for which trackio would print at the exit
        trackio.log({})
    [run] = trackio.Api().runs("of-a-test")
    rows = logs(run)
    assert run.name == result.output_dir.name
    assert [(row["step"], row["reward"]) for row in rows] == rewards_of(result)
    config = {key: value for key, value in run.config.items() if not key.startswith("_")}
    assert load_recipe(config) == load_recipe(result.output_dir / "recipe.yaml")
    for row in rows:
        if row["step"] % 2:
            assert "completions" not in row
        else:
            columns, values = completions_table(read_completions(result.output_dir, row["step"], 2))
            assert columns == COLUMNS
            shown_rows = row["completions"]["_value"]
            assert [[one[column] for column in columns] for one in shown_rows] == values
    artifact = trackio.init("of-a-test", name="reader").use_artifact(f"report-{run.id}:latest")
    page = artifact.download(str(tmp_path / "read"))
    trackio.finish()
    assert result.output_dir.name in (Path(page) / "report.html").read_text(encoding="utf-8")
    assert f"trackio: `trackio show --project of-a-test` shows {run.name}" in shown


def logs(run: Any) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(run.project, run.name, run_id=run.id)


def begun(recipe: dict[str, Any], tracker: str, steps_done: int, steps_logged: int) -> list[str]:
    """Log the next step of a run; what the user was told."""
    told: list[str] = []
    recipe["logging"]["trackers"] = [tracker]
    loaded = load_recipe(recipe)
    Path(loaded.train.output_dir).mkdir(parents=True, exist_ok=True)
    trackers = Trackers(loaded, steps_done, steps_logged, told.append)
    for step in range(steps_done + 1, steps_logged + 2):
        trackers.log({"step": step, "reward": float(step)}, step)
    trackers.finish(is_done=False)
    return told


def test_trackio_does_not_go_on_in_the_run_of_another_folder_of_the_same_name(
    trackio: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["logging"]["project"] = "two-folders"
    for place in ("a", "b"):
        recipe["train"]["output_dir"] = str(tmp_path / place / "run")
        begun(recipe, "trackio", 0, 1)
    recipe["train"]["output_dir"] = str(tmp_path / "a" / "run")
    begun(recipe, "trackio", 1, 2)
    steps = sorted([row["step"] for row in logs(run)] for run in trackio.Api().runs("two-folders"))
    assert steps == [[1, 2], [1, 2], [2, 3]]  # a run that cannot be found is begun anew, with all that is left


def test_steps_that_a_failed_tracker_did_not_take_are_sent_when_they_are_run_again(
    trackio: Any, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["logging"]["project"] = "failed-between"
    send = tracked_run.TrackedRun.log

    def fails_at_3(run: Any, values: Any, step: int, table: Any = None) -> None:
        if step == 3:
            raise ConnectionError("the server is gone")
        send(run, values, step, table)

    monkeypatch.setattr(tracked_run.TrackedRun, "log", fails_at_3)
    assert "trackio failed" in begun(recipe, "trackio", 0, 4)[-1]  # logs 5 steps
    trackio.finish()
    monkeypatch.setattr(tracked_run.TrackedRun, "log", send)
    begun(recipe, "trackio", 1, 5)
    [run] = trackio.Api().runs("failed-between")
    assert [row["step"] for row in logs(run)] == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_that_a_resume_makes_up_for_is_added_to_its_step(
    trackio: Any, recipe: dict[str, Any]
) -> None:
    recipe["logging"]["project"] = "made-up-for"
    begun(recipe, "trackio", 0, 1)
    trackers = Trackers(load_recipe(recipe), 2, 2, print)
    trackers.amend({"eval_reward": 5.0}, 2)
    trackers.finish(is_done=False)
    [run] = trackio.Api().runs("made-up-for")
    assert [(row["step"], row.get("reward"), row.get("eval_reward")) for row in logs(run)] == [
        (1, 1.0, None),
        (2, 2.0, None),
        (2, None, 5.0),
    ]


@pytest.mark.parametrize(("steps_done", "project", "is_same"), [(1, "p", True), (0, "p", False), (1, "q", False)])
def test_a_run_that_is_started_over_or_moved_to_another_project_is_another_one(
    wandb: Any, recipe: dict[str, Any], steps_done: int, project: str, is_same: bool
) -> None:
    recipe["logging"]["project"] = "p"
    begun(recipe, "wandb", 0, 2)
    first = started(wandb, Path(recipe["train"]["output_dir"]))
    recipe["logging"]["project"] = project
    begun(recipe, "wandb", steps_done, 3)
    second = started(wandb, Path(recipe["train"]["output_dir"]))
    assert (first.run_id == second.run_id) == is_same
    assert [step for step, _ in second.series("reward")] == ([4] if is_same else list(range(steps_done + 1, 5)))


@pytest.mark.parametrize(
    ("setting", "environment", "project"),
    [("math", "other", "math"), (None, "other", "other"), (None, None, "grpo-cli")],
)
def test_a_run_belongs_to_the_recipes_project_or_the_environments(
    wandb: Any,
    recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    setting: str | None,
    environment: str | None,
    project: str,
) -> None:
    if environment is not None:
        monkeypatch.setenv("WANDB_PROJECT", environment)
    recipe["logging"]["project"] = setting
    begun(recipe, "wandb", 0, 0)
    assert started(wandb, Path(recipe["train"]["output_dir"])).project == project


RUN_WITHOUT_WANDBS_PROCESS = """
import json, sys, psutil, grpo_cli

class KillsWandb:
    def on_step_end(self, state):
        if state.step == 2:
            [core] = [one for one in psutil.Process().children(recursive=True) if one.name() == "wandb-core"]
            core.kill()
            core.wait()

print(len(grpo_cli.train(json.loads(sys.argv[1]), callbacks=[KillsWandb()]).metrics), "steps were done")
"""


@pytest.mark.slow
def test_a_tracker_that_dies_is_told_once_and_the_run_goes_on(wandb: Any, recipe: dict[str, Any]) -> None:
    recipe["logging"]["trackers"] = ["wandb"]
    command = [sys.executable, "-c", RUN_WITHOUT_WANDBS_PROCESS, json.dumps(recipe)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "4 steps were done" in process.stdout, process.stderr
    told = [line for line in process.stdout.splitlines() if "wandb failed, and is sent nothing more" in line]
    assert len(told) == 1


def test_a_tracker_that_cannot_begin_is_told_and_the_run_goes_on(
    wandb: Any, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    told = begun(recipe, "wandb", 0, 1)
    assert len(told) == 1
    assert told[0].startswith("wandb failed, and is sent nothing more until the run is resumed (CommError: ")


class WandbServer(BaseHTTPRequestHandler):
    """Says yes to whatever a run asks for at its start."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        project = {"id": "1", "name": "p", "entity": {"id": "2", "name": "e"}}
        bucket = {"id": "3", "name": "an-id", "displayName": "run", "config": "{}", "project": project}
        data = {"model": {"bucket": None}, "upsertBucket": {"bucket": bucket, "inserted": True}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *told: Any) -> None:
        """The screen is not for it."""


def test_a_network_that_dies_holds_a_run_up_for_no_longer_than_it_may(
    wandb: Any, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setattr(tracked_run, "WANDB_UPLOAD_S", 1.0)
    told: list[str] = []
    recipe["logging"]["trackers"] = ["wandb"]
    check_trackers(["wandb"])
    folder = Path(recipe["train"]["output_dir"])
    folder.mkdir()
    trackers = Trackers(load_recipe(recipe), 0, 0, told.append)
    assert told == [f"wandb: {address}/e/p/runs/an-id"]
    server.shutdown()
    server.server_close()
    trackers.log({"reward": 1.0}, 1)
    began = time.monotonic()
    trackers.finish(is_done=False)
    assert time.monotonic() - began < 30
    [_, why] = told
    assert f"not everything was sent in 1 s; `wandb sync {folder}/wandb/run-" in why
    assert not [text for text in capfd.readouterr() if "wandb" in text]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "wandb has no key to send with; run `wandb login`, or set WANDB_MODE=offline"),
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ({"WANDB_API_KEY": "0" * 40}, None),
        ({"WANDB_MODE": "offline"}, None),
        ({"WANDB_MODE": "disabled"}, None),
    ],
)
def test_wandb_without_a_key_is_refused_before_anything_is_loaded(
    wandb: Any, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str | None
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        return check_trackers(["wandb"])
    with pytest.raises(UserError, match=r"logging\.trackers\.1: wandb") as caught:
        check_trackers(["tensorboard", "wandb"])
    assert expected in str(caught.value)


def test_a_table_has_conversations_as_lines_and_a_column_for_whatever_a_reward_has_logged() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    prompt = [{"role": "user", "content": "1 + 2?"}]
    one = StoredCompletion(
        step=7, group=0, sample=0, prompt=prompt, completion=said, num_sampled=9, finish_reason="stop",
        advantage=0.5, rewards={"exact": 1.0, "length": None}, extras={"answer": "3"}, token_ids=[],
        token_texts=[], logprobs=[], policy_logprobs=[], sampled=[],
    )  # fmt: skip
    columns, [row] = completions_table([one])
    assert dict(zip(columns, row, strict=True)) == {
        "step": 7,
        "prompt": "user: 1 + 2?",
        "completion": f"assistant: {json.dumps([call])}\nadd: 3\nassistant: It is 3.",
        "reward/exact": 1.0,
        "reward/length": None,
        "advantage": 0.5,
        "extra/answer": "3",
    }
