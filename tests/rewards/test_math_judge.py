import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards import math_judge
from rewards.math_judge import MathJudge


@pytest.fixture
def judge():
    judge = MathJudge(workers=1, timeout_s=1.0)
    yield judge
    judge.close()


def test_an_answer_that_takes_for_ever_is_wrong_in_time_and_the_next_is_judged(judge):
    assert judge.judge([("3", r"\boxed{3}")]) == [True]
    start = time.monotonic()
    assert judge.judge([("3", r"\boxed{9^{9^{9^{9}}}}")]) == [False]
    assert time.monotonic() - start < 3
    assert judge.judge([("3", r"\boxed{3}")]) == [True]


def test_a_child_that_died_while_idle_costs_no_answer(judge):
    assert judge.judge([("3", r"\boxed{3}")]) == [True]
    judge._idle[0]._process.kill()
    judge._idle[0]._process.wait()
    assert judge.judge([("3", r"\boxed{3}")]) == [True]


def test_child_processes_are_kept_and_ended_on_close(judge):
    judge.judge([("3", "3")])
    (worker,) = judge._idle
    judge.judge([("3", "3")] * 5)
    assert judge._idle == [worker]
    judge.close()
    assert not worker.alive()


def test_threads_share_a_judge(judge):
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda n: judge.judge([(str(n), r"\boxed{2}")])[0], range(4)))
    assert verdicts == [False, False, True, False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_asks_children_of_its_own():
    assert math_judge.shared_judge.judge([("3", "3")]) == [True]
    pid = os.fork()
    if pid == 0:
        fresh = math_judge.shared_judge._idle == []
        os._exit(0 if fresh else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert math_judge.shared_judge.judge([("4", "3")]) == [False]


def test_a_child_that_cannot_start_is_an_error_not_a_verdict(judge, monkeypatch):
    monkeypatch.setattr(math_judge, "_CHILD", Path("/nowhere/child.py"))
    with pytest.raises(RuntimeError, match=r"math-verify did not start .*/nowhere/child\.py"):
        judge.judge([("3", "3")])


def test_without_math_verify_the_error_says_what_to_install(judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(math_judge.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        judge.judge([("3", "3")])
