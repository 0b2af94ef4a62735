"""A file of a run that lost its end, or has a bit flipped, is named by whatever reads it back.

What still ends must end as if nothing had happened. Each case damages a copy of the run's folder. Commands run one
after the other in one process, which imports torch once.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from grpo_cli import cli
from tests.faults.harness import difference, recipe_for, state_of
from tests.processes import Command

pytestmark = pytest.mark.slow

PATIENCE_S = 400.0
CUTS = (0.0, 0.5, 0.999)
"""Of a file's length, at which it ends."""
FLIPS = 4
"""Bits of each file, flipped one at a time at places that follow from its name."""

END = re.compile(r"^ended with (\d+)\n", re.MULTILINE)


def many_commands() -> None:
    """Several command lines in one process."""
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv[1:] = arguments
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        sys.stdout.flush()
        print(f"ended with {code}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class World:
    """A run of four steps, and the same without what it wrote at its end: it can go on from step 2."""

    recipe: Path
    run: Path
    broken_off: Path
    folder: Path

    def commands(self, name: str, lines: list[list[str]]) -> list[tuple[int, str]]:
        """Exit code and output of each command."""
        words = self.folder / f"{name}.json"
        words.write_text(json.dumps(lines))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        output, _ = Command(words, environment=environment, main=many_commands).communicate(timeout=PATIENCE_S)
        *parts, rest = END.split(output)
        assert not rest, output[-3000:]
        ends = [(int(code), text) for text, code in zip(parts[::2], parts[1::2], strict=True)]
        assert len(ends) == len(lines), output[-3000:]
        return ends

    def train(self, run: Path, *settings: str) -> list[str]:
        overrides = [f"train.output_dir={run}", *settings]
        return ["train", str(self.recipe), *(word for one in overrides for word in ("--set", one))]

    def resume(self, run: Path) -> list[str]:
        return [*self.train(run), "--resume"]


@pytest.fixture(scope="module")
def world(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("damaged")
    run, broken_off = folder / "run-whole", folder / "run-broken-off"
    world = World(recipe_for(tiny_model_dir, folder), run, broken_off, folder)
    ends = world.commands("first", [world.train(run, "train.keep_checkpoints=2")])
    assert ends[0][0] == 0, ends
    shutil.copytree(run, broken_off)
    for name in ("final", "checkpoint-000004"):
        shutil.rmtree(broken_off / name)
    return world


def damaged(content: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """How a file is damaged, and what it then holds."""
    if not content:
        yield "something in it", b"\xff\x00{"
        return
    for cut in CUTS:
        end = min(int(len(content) * cut), len(content) - 1)
        yield f"cut at {end}", content[:end]
    rng = random.Random(name)
    for _ in range(FLIPS):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        yield (
            f"bit {bit} of byte {place}",
            content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :],
        )


def cases_of(world: World, run: Path, pattern: str) -> list[tuple[str, Path, Path]]:
    """What was done, the damaged copy of a run, and the file in it."""
    cases = []
    (path, *_) = sorted(path for path in run.glob(pattern) if path.is_file())
    name = path.relative_to(run)
    for index, (how, content) in enumerate(damaged(path.read_bytes(), str(name))):
        copy = world.folder / f"{str(name).replace('/', '-')}-{index}"
        shutil.copytree(run, copy)
        (copy / name).write_bytes(content)
        cases.append((f"{name}: {how}", copy, copy / name))
    return cases


def assert_one_message(case: str, code: int, output: str, *names: str) -> None:
    assert code in (1, 2), f"{case}: ended with {code}: {output[-2000:]}"
    assert "Traceback" not in output, f"{case}: {output[-3000:]}"
    assert any(name in output.strip().splitlines()[-1] or name in output[-600:] for name in names), (
        f"{case}: {output}"
    )


def ends_right_or_names_the_file(
    world: World,
    run: Path,
    pattern: str,
    command: Callable[[Path], list[str]],
    is_right: Callable[[Path, str], str | None],
    *also: str,
) -> int:
    """Run a command on each damaged copy; the number of those that ended with a message."""
    cases = cases_of(world, run, pattern)
    ends = world.commands(
        re.sub(r"\W", "-", f"{pattern}-{command.__name__}"), [command(copy) for _, copy, _ in cases]
    )
    refused = 0
    for (case, copy, path), (code, output) in zip(cases, ends, strict=True):
        if code == 0:
            wrong = is_right(copy, output)
            assert wrong is None, f"{case}: {wrong}: {output[-2000:]}"
            assert "Traceback" not in output, f"{case}: {output[-3000:]}"
        else:
            assert_one_message(case, code, output, path.name, *also)
            refused += 1
        shutil.rmtree(copy)
    return refused


RESUMED = [
    "recipe.yaml", "metrics.jsonl", ".lock", "tensorboard/events*", "checkpoint-000002/manifest.json",
    "checkpoint-000002/model.safetensors", "checkpoint-000002/optimizer.pt", "checkpoint-000002/scheduler.pt",
    "checkpoint-000002/position.json", "checkpoint-000002/record.json", "checkpoint-000002/config.json",
    "checkpoint-000002/tokenizer.json",
]  # fmt: skip
READ_BY_NOBODY = (".lock", "tensorboard/events*")


@pytest.mark.parametrize("pattern", RESUMED)
def test_a_resumed_run_ends_the_same_or_names_the_damaged_file(world: World, pattern: str) -> None:
    wanted = state_of(world.run)

    def is_right(copy: Path, output: str) -> str | None:
        return difference(state_of(copy), wanted)

    refused = ends_right_or_names_the_file(world, world.broken_off, pattern, world.resume, is_right)
    assert bool(refused) is (pattern not in READ_BY_NOBODY)


@pytest.mark.parametrize("pattern", ["completions/step-000001.parquet", "completions/step-000002.parquet"])
def test_a_replay_trains_on_what_was_stored_or_names_the_damaged_file(world: World, pattern: str) -> None:
    recipe = yaml.safe_load(world.recipe.read_text())
    del recipe["data"]["eval"], recipe["train"]["eval_every"]
    without_eval = world.folder / "without-eval.yaml"
    without_eval.write_text(yaml.safe_dump(recipe))

    def replay(copy: Path) -> list[str]:
        settings = ["generation.engine=replay", f"generation.replay={copy}", "train.save_every=0"]
        words = world.train(copy / "again", *settings)
        return [words[0], str(without_eval), *words[2:]]

    whole = world.folder / f"whole-{pattern[-9:-8]}"
    shutil.copytree(world.run, whole)
    ((code, output),) = world.commands(f"replay-{whole.name}", [replay(whole)])
    assert code == 0, output
    expected = state_of(whole / "again")
    refused = ends_right_or_names_the_file(
        world, world.run, pattern, replay, lambda copy, output: difference(state_of(copy / "again"), expected)
    )
    assert refused > len(CUTS)


def evaluation(output: str) -> str:
    return output[output.index("{\n") :]


MODEL_FILES = [
    "final/model.safetensors", "final/config.json", "final/generation_config.json", "final/tokenizer.json",
    "final/tokenizer_config.json", "final/manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("pattern", MODEL_FILES)
def test_an_evaluation_is_of_the_model_that_was_written_or_names_the_damaged_file(
    world: World, pattern: str
) -> None:
    def evaluate(copy: Path) -> list[str]:
        return ["eval", str(world.recipe), "--model", str(copy / "final"), "--json"]

    ((code, output),) = world.commands("evaluate", [evaluate(world.run)])
    assert code == 0, output
    expected = evaluation(output)

    def is_right(copy: Path, output: str) -> str | None:
        return None if evaluation(output) == expected else "other figures"

    refused = ends_right_or_names_the_file(world, world.run, pattern, evaluate, is_right)
    assert refused >= len(CUTS) + FLIPS - (pattern == "final/manifest.json"), "the last line's end says nothing"


@pytest.mark.parametrize("key", ["model.name", "model.reference", "model.tokenizer"])
def test_a_sample_is_of_the_model_that_was_written_or_names_the_damaged_file(world: World, key: str) -> None:
    def sample(copy: Path) -> list[str]:
        return ["sample", str(world.recipe), "-n", "1", "--set", f"{key}={copy / 'final'}"]

    pattern = "final/tokenizer.json" if key == "model.tokenizer" else "final/model.safetensors"
    refused = ends_right_or_names_the_file(world, world.run, pattern, sample, lambda copy, output: "it was taken")
    assert refused == len(CUTS) + FLIPS


@pytest.mark.parametrize("pattern", ["checkpoint-000002/optimizer.pt", "final/model.safetensors"])
def test_a_check_of_the_run_names_the_damaged_file(world: World, pattern: str) -> None:
    def check(copy: Path) -> list[str]:
        return ["check", str(copy)]

    assert (
        ends_right_or_names_the_file(world, world.run, pattern, check, lambda copy, output: "not noticed")
        == len(CUTS) + FLIPS
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_damaged_held_out_prompts_are_read_as_they_are_or_named(world: World, suffix: str) -> None:
    """Nobody has said what a user's file held: rows that are still rows are used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = world.run / f"held-out.{suffix}"
    rows = [{"prompt": f"question {index}:"} for index in range(9)]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), data)
    else:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(copy: Path) -> list[str]:
        return ["eval", str(world.recipe), "--json", "--set", f"data.eval.name={copy / data.name}"]

    ends_right_or_names_the_file(world, world.run, data.name, evaluate, lambda copy, output: None, "data.eval")
    data.unlink()


def test_a_damaged_key_file_is_named_and_never_quoted(world: World) -> None:
    recipe = yaml.safe_load(world.recipe.read_text())
    key = "0123456789abcdefghijKLMNOP"
    file = world.run / "key"
    file.write_text(key + "\n")
    server = {"urls": ["127.0.0.1:9"], "timeout_s": 0.5, "api_key_file": "KEY"}

    def check(copy: Path) -> list[str]:
        (copy / "key").chmod(0o600)
        changed = recipe | {"generation": recipe["generation"] | {"engine": "vllm_server", "server": server}}
        changed["generation"]["server"] = server | {"api_key_file": str(copy / "key")}
        (copy / "with-key.yaml").write_text(yaml.safe_dump(changed))
        return ["check", str(copy / "with-key.yaml")]

    def is_right(copy: Path, output: str) -> str | None:
        return "the key was printed" if key[:12] in output else None

    assert ends_right_or_names_the_file(world, world.run, file.name, check, is_right) >= 1
    file.unlink()
