"""`benchmarks.gpu`: its arithmetic, its verdicts, and that it goes on where it was. No GPU is needed."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import _gpu_decode, _gpu_learn, _gpu_profile, _gpu_published, gpu
from benchmarks._gpu_arithmetic import (
    MICRO_BATCHES,
    PUBLISHED,
    Decoder,
    peak_flops,
    training_flops,
)
from benchmarks._gpu_memory import finding as memory_finding
from benchmarks._gpu_results import ROOT, Finding, Outcome, Part, Place, Results, sources_digest, write_report
from benchmarks._gpu_runs import Peaks
from benchmarks._gpu_tests import counts, files_with_gpu_tests
from benchmarks._models import LETTERS, RANDOM_MODELS, ModelSize, letter_tokenizer, random_model
from benchmarks._report import Bar

PLACE = Place("NVIDIA H200, driver 1.2", "abc", rehearsal=False)
QWEN3_06B = Decoder(weights=595_984_384, layers=28, attention_width=16 * 128)
QWEN3_06B_AS_H100 = "NVIDIA H100 80GB HBM3"


def part(code: str, *, pieces: tuple[str, ...] = ("one",), limit_s: int = 60) -> Part:
    """A part whose command is replaced by `python -c code`."""
    columns = ("piece", "what", "figure")
    return Part("example", "An example", "What it\nshows.", columns, limit_s, pieces, pieces, lambda *_: Finding())


def test_the_large_shapes_are_those_of_the_published_models() -> None:
    import torch

    sizes = {
        "random-qwen2.5-0.5b": 494_032_768,
        "random-qwen2.5-1.5b": 1_543_714_304,
        "random-qwen3-0.6b": 596_049_920,
        "random-qwen3-4b": 4_022_468_096,
    }
    for name, expected in sizes.items():
        model = random_model(name, "meta", torch.float32)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected, name
        assert model.lm_head.weight is model.model.embed_tokens.weight
    size = ModelSize.of(random_model("random-qwen3-0.6b", "meta", torch.float32))
    assert size.body + size.head == QWEN3_06B.weights


@pytest.mark.parametrize("piece", [name for name, case in PUBLISHED.items() if case.peak_share])
def test_operations_are_counted_as_in_the_published_shares_of_peak(piece: str) -> None:
    case, peak = PUBLISHED[piece], peak_flops(QWEN3_06B_AS_H100)
    assert peak is not None
    assert case.peak_share is not None
    flops_per_token = training_flops(QWEN3_06B, [case.row]) / case.row
    assert case.tokens_per_second * flops_per_token / peak == pytest.approx(case.peak_share, rel=2e-3)


def test_operations_of_a_sequence_by_hand() -> None:
    decoder = Decoder(weights=10, layers=2, attention_width=3)
    # 6 for each of 10 weights and 4 tokens; 8 pairs in each of 2 layers, 12 for each and unit of width.
    assert training_flops(decoder, [4]) == 6 * 10 * 4 + 12 * 2 * 3 * 8
    assert training_flops(decoder, [4, 4]) == 2 * training_flops(decoder, [4])
    frozen = replace(decoder, adapter=5)
    assert training_flops(frozen, [4]) == (4 * 10 + 6 * 5) * 4 + 12 * 2 * 3 * 8


def test_peaks_are_told_apart_by_the_cards_names() -> None:
    assert peak_flops("NVIDIA H200") == peak_flops(QWEN3_06B_AS_H100) == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") == 835e12
    assert peak_flops("Tesla T4") is None


def test_a_published_shape_is_held_against_its_own_figures() -> None:
    case = PUBLISHED["qwen3-0.6b-16384"]
    peaks = Peaks("cpu")
    peaks.allocated, peaks.reserved = {"training": 12 * 2**30}, {"training": 13 * 2**30}
    tokens = MICRO_BATCHES * case.row
    shown = _gpu_published.finding("p", case, "NVIDIA H200", QWEN3_06B, case.row, tokens / 12_000, peaks)
    verdicts = [str(bar).split()[0] for bar in shown.bars]
    assert verdicts == ["PASS", "MISS", "MISS"], "tokens, memory of the allocator, tokens of their steps alone"
    assert shown.rows[0][2] == "12,000"
    own = _gpu_published.finding("own", None, "unknown", QWEN3_06B, case.row, 1.0, peaks)
    assert not own.bars, "no share of a peak that is not known"


def test_the_plan_is_judged_by_its_peak_in_either_direction() -> None:
    measured = {"generation": 1e9, "training": 4e9, "optimizer step": 2e9}
    for factor, verdict in ((0.85, "MISS"), (0.95, "PASS"), (1.05, "PASS"), (1.15, "MISS")):
        shown = memory_finding("full", {phase: factor * size for phase, size in measured.items()}, measured)
        assert str(shown.bars[0]).startswith(verdict)
    assert [row[1] for row in shown.rows] == ["generation", "training", "optimizer step", "peak"]


def test_each_phase_has_a_peak_of_its_own_and_keeps_its_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    peak = {"allocated": 0, "reserved": 0}

    def take(size: int) -> None:
        peak["allocated"], peak["reserved"] = max(peak["allocated"], size), max(peak["reserved"], 2 * size)

    for name, stand_in in {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: peak.update(allocated=0, reserved=0),
        "max_memory_allocated": lambda: peak["allocated"],
        "max_memory_reserved": lambda: peak["reserved"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    peaks = Peaks("cuda")
    take(99)
    for size in (5, 3):
        with peaks.of("generation"):
            take(size)
        peaks.begin()
        take(2 * size)
        peaks.end("training")
    assert peaks.allocated == {"generation": 5, "training": 10}
    assert peaks.reserved == {"generation": 10, "training": 20}


def test_an_engine_with_graphs_decodes_with_and_without_them() -> None:
    assert _gpu_decode.ways(SimpleNamespace(graphs="the graphs")) == {"eager": None, "graphs": "the graphs"}
    assert _gpu_decode.ways(SimpleNamespace(graphs=None)) == {"eager": None}
    assert _gpu_decode.ways(SimpleNamespace()) == {"eager": None}
    rollout = _gpu_decode.Rollout("random-tiny", 24, 10, 4, 2)
    rows = _gpu_decode.rows_of("p", rollout, 0.5, {"eager": 4.0, "graphs": 1.0})
    assert rows[1] == ["p", "graphs", "1.00", "100.0", "80", "50%", "4.00×"]


def test_learning_is_judged_by_both_ends_of_the_run() -> None:
    shown = _gpu_learn.finding("p", [2.0] * 5 + [9.0] * 3 + [2.9] * 5, [1.0, 2.0, 3.0])
    assert str(shown.bars[0]).startswith("MISS")
    assert shown.rows == [["p", "13", "2.00", "2.90", "2.00"]]


def test_random_text_of_letters_leaves_room_for_more() -> None:
    tokenizer = letter_tokenizer(512)
    assert tokenizer.decode([1, 2, 3, 0, 8, 16]) == "aaabcd"
    ids = tokenizer("a1 b0 c8")["input_ids"]
    assert ids == [1, 0, 8]
    assert set(tokenizer.decode(range(510))) == {"a", *LETTERS}
    assert RANDOM_MODELS["random-tiny"]["vocab_size"] == len(tokenizer)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    finding = Finding([["one", "a|b", "3"]], [Bar("speed", 2.0, 2.5)], ["a note"])
    results = Results(tmp_path / "results")
    results.add("example", "one", Outcome(PLACE, "done", 1.5, finding))
    results.add("example", "two", Outcome(PLACE, "failed", 2.5, tail=["Error: gone"]))
    back = results.of("example")
    assert back["one"].finding == finding
    assert back["one"].settles(PLACE)
    assert not back["one"].settles(replace(PLACE, sources="other"))
    assert not back["two"].settles(PLACE), "what failed is tried again"


def run(
    monkeypatch: pytest.MonkeyPatch, example: Part, results: Results, code: str, **changes: object
) -> list[str]:
    """Run the part's pieces, each as `python -c code FILE`, which writes its finding to the file."""
    options = Namespace(**({"parts": [example], "rehearse": False, "device": "cpu", "within": None, "again": False}
                           | changes))  # fmt: skip
    started = gpu.run_piece

    def run_code(command: list[str], answer: Path, limit_s: float, place: Place) -> Outcome:
        return started([sys.executable, "-c", code, str(answer)], answer, limit_s, place)

    monkeypatch.setattr(gpu, "run_piece", run_code)
    missing = gpu.run_parts(options, results, PLACE)
    monkeypatch.setattr(gpu, "run_piece", started)
    return missing


WRITE = """
import json, sys
json.dump({"rows": [["one", "ran", "1"]], "bars": [], "notes": []}, open(sys.argv[1], "w"))
"""


def test_what_is_done_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, example = Results(tmp_path), part(WRITE)
    assert run(monkeypatch, example, results, WRITE) == []
    assert run(monkeypatch, example, results, "raise SystemExit('was run again')") == []
    assert "example one: done before" in capsys.readouterr().out
    assert run(monkeypatch, example, results, "raise SystemExit('was run again')", again=True) == ["example one"]


def test_a_piece_that_crashes_is_reported_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results, example = Results(tmp_path), part("", pieces=("one", "two"))
    code = "print('torch.OutOfMemoryError: CUDA out of memory.'); raise SystemExit(3)"
    assert run(monkeypatch, example, results, code) == ["example one", "example two"]
    results.add("example", "two", Outcome(PLACE, "done", 1.0, Finding([["two", "ran", "7"]])))
    report = tmp_path / "report.md"
    write_report([example], results, PLACE, report, "abc")
    text = report.read_text()
    assert "| one | failed: torch.OutOfMemoryError: CUDA out of memory. |  |" in text
    assert "| two | ran | 7 |" in text
    assert "What it shows." in text


def test_a_piece_that_takes_too_long_is_ended_with_its_processes(tmp_path: Path) -> None:
    child = "import time; print('child is alive', flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = gpu.run_piece([sys.executable, "-c", code], tmp_path / "none", 3.0, PLACE)
    assert outcome.status == "out of time"
    assert outcome.tail[-1] == "stopped after 3 s"
    assert outcome.seconds < 30


def test_a_piece_does_not_outlive_the_command(tmp_path: Path) -> None:
    piece = (
        "import os, time; from benchmarks.gpu import end_with_parent; end_with_parent();"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    )
    code = (
        "import sys; from pathlib import Path; from benchmarks import gpu; Place = gpu.Place;"
        f"gpu.run_piece([sys.executable, '-c', {piece!r}], Path('none'), 100.0, Place('', '', False))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as command:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        pid = int((tmp_path / "pid").read_text())
        assert psutil.pid_exists(pid)
        command.kill()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.05)


def test_a_piece_that_a_signal_ends_says_so(tmp_path: Path) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    outcome = gpu.run_piece([sys.executable, "-c", code], tmp_path / "none", 30.0, PLACE)
    assert (outcome.status, outcome.tail) == ("failed", ["ended by SIGKILL"])


def test_nothing_is_started_that_could_not_end_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert run(monkeypatch, part(WRITE), results, WRITE, within=60 * gpu.LEAST_SHARE - 1.0) == ["example one"]
    assert results.of("example") == {}


def test_results_of_another_card_are_no_part_of_the_report(tmp_path: Path) -> None:
    results, example = Results(tmp_path), part("")
    other = replace(PLACE, card="another card")
    results.add("example", "one", Outcome(other, "done", 1.0, Finding([["one", "ran", "7"]])))
    write_report([example], results, PLACE, tmp_path / "report.md", "abc")
    assert "| one | not run |" in (tmp_path / "report.md").read_text()
    older = replace(PLACE, sources="older")
    results.add("example", "one", Outcome(older, "done", 1.0, Finding([["one", "ran", "7"]])))
    write_report([example], results, PLACE, tmp_path / "report.md", "abc")
    assert "one was measured on sources older." in (tmp_path / "report.md").read_text()


def test_changed_sources_are_other_sources(tmp_path: Path) -> None:
    (tmp_path / "grpo_cli").mkdir()
    (tmp_path / "grpo_cli" / "one.py").write_text("a = 1")
    before = sources_digest(tmp_path)
    (tmp_path / "grpo_cli" / "one.py").write_text("a = 2")
    assert sources_digest(tmp_path) != before


def test_waits_are_counted_by_the_line_of_ours_that_they_are_in() -> None:
    counter = _gpu_profile.SyncCounter()
    counter.start()
    try:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    finally:
        counter.stop()
    (line,) = counter.lines
    assert line.startswith("tests/benchmarks/test_gpu.py:")
    assert counter.lines.total() == 3
    ours = traceback.FrameSummary(str(ROOT / "grpo_cli/train/update.py"), 7, "apply")
    inner = traceback.FrameSummary("/somewhere/torch/_tensor.py", 9, "item")
    assert _gpu_profile.own_line([ours, inner]) == "grpo_cli/train/update.py:7 apply in torch/_tensor.py:9 item"
    assert _gpu_profile.own_line([inner]) == "torch/_tensor.py:9 item"


def test_kernels_are_ranked_by_their_time_and_waits_by_their_count() -> None:
    def event(key: str, device: str, count: int, microseconds: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(key=key, device_type=f"DeviceType.{device}", count=count,
                               self_device_time_total=microseconds, is_user_annotation=annotation)  # fmt: skip

    events = [
        event("aten::item", "CPU", 5, 0),
        event("short", "CUDA", 1, 250),
        event("long", "CUDA", 2, 750),
        event("region", "CUDA", 1, 9999, annotation=True),
    ]
    kernels = [each for each in events if _gpu_profile.is_kernel(each)]
    rows = _gpu_profile.kernel_rows(kernels, "kernel", lambda each: each.self_device_time_total / 1e6)
    assert [row[1:] for row in rows] == [["long", "2", "0.75", "75.0%"], ["short", "1", "0.25", "25.0%"]]
    waits = _gpu_profile.wait_rows(events, Counter({f"line {n}": 1 for n in range(25)}))
    assert ["call", "aten::item", "5", "", ""] in waits
    assert waits[-1] == ["waits by line", "all others", "5", "", ""]


def test_pytests_last_line_is_read() -> None:
    output = "....\nFAILED tests/a.py::b\n1 failed, 12 passed, 3 skipped, 90 deselected, 2 errors in 3.2s\n"
    found = {"failed": 1, "passed": 12, "skipped": 3, "deselected": 90, "error": 2}
    assert counts(output) == found
    assert "tests/policy/test_attention.py" in files_with_gpu_tests()


def test_parts_are_chosen_by_name_and_a_cpu_only_rehearses(capsys: pytest.CaptureFixture[str]) -> None:
    assert [each.name for each in gpu.parse_options(["--parts", "step,machine"]).parts] == ["machine", "step"]
    for wrong in (["--parts", "stop"], ["--device", "cpu"]):
        with pytest.raises(SystemExit) as error:
            gpu.parse_options(wrong)
        assert error.value.code == 2
    for each in gpu.PARTS.values():
        assert each.limit_s < 600, "a command of any piece ends within ten minutes"
        assert len(each.columns) >= 2


@pytest.mark.slow
def test_a_rehearsal_goes_through_the_parts_and_on_where_it_was(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--rehearse"]
    command += ["--parts", "learn,published,memory,profile", "--out", str(tmp_path), "--markdown", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = report.read_text()
    assert "A rehearsal with tiny models" in text
    assert "PASS  mean reward, times that of the first steps" in text
    assert "failed:" not in text
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") == 5
