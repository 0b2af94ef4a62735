"""Reward functions that misbehave in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import grpo_cli
from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import RewardConfig
from grpo_cli.reward import isolated, registry
from grpo_cli.reward.hooks import TrainerState, extra_columns, logged_metrics
from grpo_cli.reward.registry import resolve_rewards
from grpo_cli.reward.scorer import RewardError, Scorer, ScoringBatch

FUNCTIONS = '''
import asyncio, collections, ctypes, os, signal, sys, time

def lengths(completions, bonus=0, **_):
    return [len(text) + bonus for text in completions]

def keyword(completions, word):
    return [None if w is None else float(w in text) for w, text in zip(word, completions)]

async def later(completions, **_):
    await asyncio.sleep(0)
    return [1.0] * len(completions)

class Counting:
    def __init__(self, start=0):
        self.calls = start
    def __call__(self, completions, **_):
        self.calls += 1
        return [self.calls] * len(completions)

def pids(completions, **_):
    time.sleep(0.3)
    return [os.getpid()] * len(completions)

def torchless(completions, **_):
    return ["torch" in sys.modules] * len(completions)

class Bad:
    """Misbehaves as the first completion says, once it has told who it is."""
    def __init__(self, folder):
        self.folder, self.leaked = folder, []
    def __call__(self, completions, **_):
        open(f"{self.folder}/pids", "a").write(f"{os.getpid()} ")
        getattr(self, completions[0], lambda: None)()
        return [0.5] * len(completions)
    def hang_in_c(self):
        # Holds the interpreter's lock, so no thread and no signal handler of Python runs.
        ctypes.PyDLL(None).sleep(60)
    def exits(self): os._exit(3)
    def crashes(self): ctypes.string_at(0)
    def killed(self): os.kill(os.getpid(), signal.SIGKILL)
    def raises(self): raise KeyError("no such word")
    def says_exit(self): sys.exit("done")
    def leaks(self):
        while True:
            self.leaked.append(bytes(10 << 20))
    def prints(self):
        for _ in range(5000): print("x" * 1000)
        os.write(1, b"y" * 1000000)
    def forks(self):
        os.fork()
    def starts(self):
        child = os.fork()
        if not child:
            os.setsid()
            open(f"{self.folder}/pids", "a").write(f"{os.getpid()} ")
            time.sleep(60)
    def starts_and_hangs(self):
        self.starts()
        time.sleep(60)

def wrong(completions, **_):
    return ["three"] * len(completions)

def logs(completions, trainer_state, log_extra, log_metric):
    log_extra("text", completions)
    log_extra("mixed", [1, "two", None, {"three": 3.5}][:len(completions)])
    log_metric("length", sum(map(len, completions)) / len(completions))
    log_metric("odd", float("nan"))
    return [trainer_state.global_step] * len(completions)

async def logs_later(completions, **hooks):
    await asyncio.sleep(0)
    hooks["log_metric"]("later", 2)
    return [hooks["trainer_state"].max_steps] * len(completions)

def logs_too_few(completions, log_extra):
    log_extra("few", completions[1:])

def logs_ours(completions, log_metric):
    log_metric("kl", 1.0)

def counts(prompts):
    return [float(len(prompts))] * len(prompts)

def changes(completions, prompts, **_):
    completions[0] = "changed"
    prompts[0][0]["content"] = "changed"
    return [1.0] * len(completions)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "apart.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reward(name, **settings):
    (function,) = resolve_rewards([RewardConfig(path=f"apart:{name}", isolate=True, **settings)])
    return function


def bad(folder, **settings):
    return reward("Bad", params={"folder": str(folder)}, **settings)


def batch(*completions, **columns):
    prompts = [[{"role": "user", "content": "p"}] for _ in completions]
    return ScoringBatch(prompts, list(completions), [[1]] * len(completions), columns)


def score(function, *completions, **columns):
    return Scorer([function]).score(batch(*completions, **columns), step=4)[:, 0].tolist()


def runs(pid):
    """Whether a process runs: a zombie that nobody reaped does not."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def all_gone(folder, count):
    pids = (folder / "pids").read_text().split()
    assert len(pids) == count
    end = time.monotonic() + 5
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(map(runs, pids))


def test_functions_give_what_they_give_without_it(folder):
    assert score(reward("lengths", params={"bonus": 2}), "a", "bcd") == [3.0, 5.0]
    assert score(reward("later", timeout_s=20), "a") == [1.0]
    function = reward("keyword")
    assert (function.accepts, function.required) == ({"completions", "word"}, {"completions", "word"})
    np.testing.assert_equal(score(function, "a", "b", word=["a", None], other=[1, 2]), [1.0, np.nan])
    counting = reward("Counting", params={"start": 4})
    assert [score(counting, "a"), score(counting, "a")] == [[5.0], [6.0]]
    assert "apart" not in sys.modules


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("missing", {}, "rewards.0: apart has no missing"),
        ("Counting", {"begin": 1}, "rewards.0: apart:Counting does not take begin; params can be: start"),
        ("Counting", {"start": {}}, None),
    ],
)
def test_what_is_wrong_is_said_before_the_run(folder, name, params, message):
    if message is None:
        (folder / "apart.py").write_text("import os\nos._exit(4)")
        message = (
            "rewards.0: apart:Counting cannot be called apart: its process ended with exit code 4 as it started"
        )
    with pytest.raises(UserError, match=message):
        reward(name, params=params)


def test_a_python_object_is_refused(folder):
    recipe = {
        "model": {"name": "m"},
        "rewards": [{"isolate": True}],
        "train": {"output_dir": "run", "max_steps": 1},
    }
    with pytest.raises(UserError, match=r"rewards\.0\.isolate: a function that came as an object"):
        grpo_cli.train(recipe, rewards=[len], train_data=[{"prompt": "a"}])


def test_it_imports_no_torch(folder):
    assert score(reward("torchless"), "a") == [0.0]


def test_a_time_limit_ends_what_hangs_in_c_and_the_next_call_works(folder):
    function = bad(folder, timeout_s=0.5, on_error="none")
    start = time.monotonic()
    np.testing.assert_equal(score(function, "hang_in_c"), [np.nan])
    assert time.monotonic() - start < 4
    assert all_gone(folder, 1)
    # A new process takes longer to start than a call may take.
    assert score(function, "fine") == [0.5]


def test_an_end_by_time_is_told_as_any_other(folder):
    with pytest.raises(RewardError, match=r"reward Bad, step 4: took longer than 0.2 seconds \(timeout_s\)"):
        score(bad(folder, timeout_s=0.2), "hang_in_c")


def test_what_a_call_started_ends_with_its_process(folder):
    function = bad(folder, timeout_s=0.5, on_error="none")
    score(function, "starts_and_hangs")
    assert all_gone(folder, 2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("exits", "its process ended with exit code 3"),
        ("crashes", "its process was ended by SIGSEGV"),
        ("killed", "its process was ended by SIGKILL"),
        ("raises", r"raised KeyError: 'no such word' at .*apart.py:\d+"),
        ("says_exit", "raised SystemExit: done"),
    ],
)
def test_failures_are_named_and_the_next_call_works(folder, how, message):
    function = bad(folder)
    with pytest.raises(RewardError, match=f"reward Bad, step 4: {message}"):
        score(function, how)
    assert score(function, "fine") == [0.5]


def test_a_process_that_cannot_start_again_is_named(folder):
    function = bad(folder)
    with pytest.raises(RewardError):
        score(function, "exits")
    (folder / "apart.py").write_text("import missing_module")
    with pytest.raises(RewardError, match=r"could not start again: rewards\.0: apart needs missing_module"):
        score(function, "fine")


def test_on_error_none_leaves_a_crash_without_score(folder, caplog):
    np.testing.assert_equal(score(bad(folder, on_error="none"), "exits", "b"), [np.nan, np.nan])
    assert "its process ended with exit code 3" in caplog.text


def test_what_is_no_number_is_named(folder):
    with pytest.raises(RewardError, match="value 0 is a str, not a number: 'three'"):
        score(reward("wrong"), "a")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds it")
def test_memory_is_bounded_and_a_leak_ends_with_its_process(folder, monkeypatch):
    monkeypatch.setattr(registry, "memory_for", lambda workers: 1 << 28)
    function = bad(folder)
    with pytest.raises(RewardError, match="raised MemoryError"):
        score(function, "leaks")
    assert score(function, "fine") == [0.5]
    first, second = (folder / "pids").read_text().split()
    assert first != second
    assert not runs(first)


def test_processes_share_what_a_function_may_have(monkeypatch):
    monkeypatch.setattr(isolated, "_usable_memory", lambda: 64 << 30)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [isolated.memory_for(workers) >> 30 for workers in (0, 1, 4, 1000)] == [16, 16, 4, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert isolated.memory_for(4) >> 30 == 2


def test_printing_much_changes_nothing(folder, capfd):
    assert score(bad(folder), "prints") == [0.5]
    assert len(capfd.readouterr().out) == 5000 * 1001 + 1000000


def test_a_fork_that_returns_answers_once(folder):
    function = bad(folder)
    assert [score(function, "forks"), score(function, "fine"), score(function, "fine")] == [[0.5]] * 3


def test_changed_arguments_stay_there(folder):
    given = batch("a", "b")
    Scorer([reward("changes")]).score(given, step=0)
    assert given.completions == ["a", "b"]
    assert given.prompts[0] == [{"role": "user", "content": "p"}]


def test_what_is_logged_comes_back_and_the_state_goes_there(folder):
    given, state = batch("a", "bcd", "e", "f"), TrainerState(global_step=3, max_steps=9)
    functions = [reward("logs"), reward("logs_later")]
    scored = Scorer(functions).score_and_log(given, step=4, state=state)
    assert scored.rewards.tolist() == [[3.0, 9.0]] * 4
    assert extra_columns(scored.logged, ["logs", "logs_later"], 4) == {
        "mixed": [1, "two", None, '{"three": 3.5}'],
        "text": ["a", "bcd", "e", "f"],
    }
    metrics = logged_metrics(scored.logged)
    assert np.isnan(metrics.pop("odd"))
    assert metrics == {"length": 1.5, "later": 2.0}


def test_reading_a_long_answer_takes_time_in_proportion():
    """Not with its square: what is logged may be megabytes."""
    line = json.dumps({"extras": {"text": ["a" * 2_000_000]}}).encode() + b"\n"

    class Dribbles:
        sent = 0

        def settimeout(self, _):
            pass

        def recv(self, _):
            self.sent += 10
            return line[self.sent - 10 : self.sent]

    process = object.__new__(isolated._Process)
    process._unread, process._connection = bytearray(b"half of something\n"), Dribbles()
    begin = time.monotonic()
    assert process._receive(None) == json.loads(line)
    assert time.monotonic() - begin < 4, "it takes 0.1 s, and took 9 when the time went with the square"


def test_what_is_logged_wrongly_there_is_named_here(folder):
    with pytest.raises(
        RewardError, match="reward logs_too_few, step 4: log_extra of 'few' was given 1 values for 2"
    ):
        score(reward("logs_too_few"), "a", "b")
    with pytest.raises(
        RewardError, match="reward logs_ours, step 4: log_metric: 'kl' is a metric of the run's own"
    ):
        score(reward("logs_ours"), "a", "b")


def test_a_function_that_takes_no_completions_is_called(folder):
    assert score(reward("counts"), "a", "b") == [2.0, 2.0]


def test_a_process_that_ends_while_it_waits_costs_no_call(folder):
    function = reward("pids")
    (first,) = score(function, "a")
    os.kill(int(first), 9)
    time.sleep(0.1)
    assert score(function, "a") != [first]


def test_calls_at_the_same_time_have_a_process_each(folder):
    function = reward("pids", workers=3)
    found = []
    threads = [threading.Thread(target=lambda: found.append(score(function, "a")[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 3
    assert score(function, "a")[0] in found


def test_nothing_is_left_when_the_trainer_is_killed(folder):
    code = """
from grpo_cli.recipe.schema import RewardConfig
from grpo_cli.reward.registry import resolve_rewards
(function,) = resolve_rewards([RewardConfig(path="apart:Bad", isolate=True, params={"folder": "."})])
function.call(completions=["starts"])
function.call(completions=["hang_in_c"])
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    end = time.monotonic() + 20
    while time.monotonic() < end and (
        not (folder / "pids").exists() or len((folder / "pids").read_text().split()) < 3
    ):
        time.sleep(0.01)
    trainer.kill()
    trainer.wait()
    assert all_gone(folder, 3)


def test_a_scheduler_that_signals_every_process_stops_no_call(folder):
    function = reward("Counting")
    process = function.call._idle[0]._process.pid
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    for pid in (process, *map(int, children)):
        os.kill(pid, 15)
        os.kill(pid, 10)
    assert [score(function, "a"), score(function, "a")] == [[1.0], [2.0]]
