import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from rewards import sandbox
from rewards.sandbox import run_python

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can find processes that hide")


@pytest.fixture(autouse=True)
def with_limits_only(monkeypatch):
    """What is promised where bubblewrap does not work; `test_bubblewrap.py` has the rest."""
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: "not here")


def eventually(condition, seconds=3.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def runs(pid):
    """Whether a process runs: a zombie that nobody reaped does not."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_program_that_ends_has_finished_and_its_output_is_returned():
    result = run_python("import sys; print('héllo ✓'); print('oops', file=sys.stderr)")
    assert (result.exit_code, result.timed_out, result.finished) == (0, False, True)
    assert sorted(result.output.split("\n")) == ["", "héllo ✓", "oops"]
    assert result.passed


def test_an_exception_is_exit_code_1_with_its_traceback():
    result = run_python("assert 1 == 2, 'not equal'")
    assert result.exit_code == 1
    assert not result.finished
    assert "AssertionError: not equal" in result.output


@pytest.mark.parametrize("source", ["def f(:", "\0", "\ud800", "raise SystemExit(3)"])
def test_source_that_cannot_run_fails_and_harms_nobody(source):
    result = run_python(source)
    assert result.exit_code != 0
    assert not result.finished


def test_a_death_by_signal_is_told_as_subprocess_tells_it():
    assert run_python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").exit_code == -signal.SIGSEGV


@pytest.mark.parametrize("source", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_an_early_exit_with_code_0_has_not_finished(source):
    result = run_python([source, "assert False"])
    assert result.exit_code == 0
    assert not result.finished
    assert not result.passed


def test_an_error_while_the_interpreter_ends_does_not_pass():
    result = run_python("import atexit, os; atexit.register(os._exit, 7)")
    assert result.finished
    assert not result.passed


def test_parts_share_a_namespace_and_run_in_order():
    result = run_python(["def f():\n    return 2", "x = f() + 1", "print(x, __name__)"])
    assert result.output == "3 __main__\n"


def test_a_part_cannot_swallow_the_next():
    assert not run_python(["x = '''", "assert False"]).finished
    assert not run_python(["if True:\n    pass\nelse:\n    (", "assert False"]).finished


def test_names_of_the_program_can_be_pickled_and_made_dataclasses():
    source = """
        import pickle
        from dataclasses import dataclass
        @dataclass
        class Point:
            x: "int"
        assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
    """
    assert run_python(source.replace("\n        ", "\n")).passed


def test_an_infinite_loop_is_stopped():
    start = time.monotonic()
    result = run_python("print('begun', flush=True)\nwhile True: pass", timeout_s=0.5)
    assert time.monotonic() - start < 3
    assert result.timed_out
    assert result.exit_code == -signal.SIGKILL
    assert result.output == "begun\n"


def test_a_program_that_sleeps_with_closed_output_is_stopped():
    start = time.monotonic()
    result = run_python("import os, time; os.close(1); os.close(2); time.sleep(60)", timeout_s=0.5)
    assert time.monotonic() - start < 3
    assert result.timed_out


def test_a_thread_that_never_ends_is_stopped():
    assert run_python(
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", timeout_s=0.5
    ).timed_out


@ON_LINUX
def test_a_memory_hog_fails():
    result = run_python("hog = []\nwhile True: hog.append(bytes(1 << 20))", memory_mb=256)
    assert "MemoryError" in result.output
    assert not result.finished


def test_endless_printing_is_bounded():
    result = run_python("while True: print('x' * 1000)", timeout_s=0.5, output_bytes=10_000)
    assert result.timed_out
    assert len(result.output) == 10_000


def test_printing_more_than_is_kept_changes_no_verdict():
    result = run_python("for _ in range(300): print('x' * 1000)", output_bytes=100)
    assert result.passed
    assert len(result.output) == 100


def test_a_huge_file_is_refused():
    assert "File too large" in run_python("open('f', 'wb').write(bytes(32 << 20))").output


@ON_LINUX
def test_a_grandchild_does_not_outlive_the_program():
    source = "import os, time\npid = os.fork()\nif pid: print(pid)\nelse: time.sleep(60)"
    result = run_python(source)
    assert result.passed
    assert eventually(lambda: not runs(int(result.output)))


@ON_LINUX
def test_a_grandchild_in_its_own_session_does_not_outlive_the_timeout():
    source = """
import subprocess, time
print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, flush=True)
time.sleep(60)
"""
    result = run_python(source, timeout_s=1.0)
    assert result.timed_out
    assert eventually(lambda: not runs(int(result.output)))


@ON_LINUX
def test_a_program_that_kills_its_supervisor_fails_and_dies_with_it():
    source = "import os, time\nprint(os.getpid(), flush=True)\nos.kill(os.getppid(), 9)\ntime.sleep(60)"
    result = run_python(source)
    assert not result.passed
    assert eventually(lambda: not runs(int(result.output)))


@ON_LINUX
def test_the_program_dies_with_the_trainer(tmp_path):
    code = "from rewards.sandbox import run_python; run_python('import time; time.sleep(60)', timeout_s=1.0)"
    # A killed trainer cannot remove the working directory.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    trainer = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children")
    assert eventually(lambda: children.read_text().strip() != "", seconds=10)
    (supervisor,) = children.read_text().split()
    trainer.kill()
    trainer.wait()
    assert eventually(lambda: not runs(int(supervisor)), seconds=5)


def test_secrets_of_the_environment_are_not_visible(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = run_python("import os; print(sorted(os.environ))")
    assert "HF_TOKEN" not in result.output
    assert "hf_secret" not in run_python("import os; print(os.environ)").output


def test_the_trainers_folder_is_neither_current_nor_importable(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run_python("import os; print(os.listdir())\nimport mine")
    assert result.output.startswith("[]\n")
    assert "ModuleNotFoundError" in result.output


def test_standard_input_is_empty():
    assert "EOFError" in run_python("input()").output


@ON_LINUX
def test_the_token_is_not_where_a_program_would_look(monkeypatch):
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda size: "the-token")
    source = """
import os, sys
print(sys.argv, vars(), os.environ, sys.stdin.read())
for name in ["/proc/self/cmdline", "/proc/self/environ", f"/proc/{os.getppid()}/cmdline", *os.listdir()]:
    print(open(name).read())
"""
    result = run_python([source, "pass"])
    assert result.passed
    assert "solution.py" in result.output
    assert "the-token" not in result.output


def test_the_order_of_a_set_is_the_same_on_every_run():
    source = "print({f'name{n}' for n in range(50)})"
    assert run_python(source).output == run_python(source).output


@pytest.mark.parametrize(
    "source",
    [
        "open('file', 'w').write('x')",
        "import os\nos.mkdir('d')\nopen('d/file', 'w')\nos.chmod('d', 0)",
        "import os\nfor _ in range(2000):\n    os.mkdir('d')\n    os.chdir('d')",
    ],
)
def test_the_working_directory_is_removed(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_python(source).passed
    assert list(tmp_path.iterdir()) == []


def test_removing_the_working_directory_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("kept")
    source = f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nos.mkdir('d')\nopen('d/f', 'w')\nos.chmod('d', 0)"
    assert run_python(source).passed
    assert (tmp_path / "precious").read_text() == "kept"


def test_no_descriptor_is_left_open():
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    run_python("pass")
    before = len(os.listdir("/proc/self/fd"))
    run_python("pass")
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_works_from_a_thread_whose_signals_are_blocked():
    results = []

    def work():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM, signal.SIGCHLD})
        results.append(run_python("while True: pass", timeout_s=0.3))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert results[0].timed_out


def test_an_interpreter_that_cannot_start_is_an_error_not_a_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "_CHILD", Path("/nowhere/child.py"))
    with pytest.raises(RuntimeError, match=r"could not start .*/nowhere/child\.py"):
        run_python("pass")
