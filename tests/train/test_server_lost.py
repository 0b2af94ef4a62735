"""A rollout server that stays away ends the run with a checkpoint, from which it ends as if nothing had been."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import grpo_cli
from grpo_cli.errors import ServerLost, StoppedEarly
from grpo_cli.record.metrics import read_metrics
from grpo_cli.rollout.embedded.engine import EmbeddedEngine
from grpo_cli.train.api import SHOWCASE_STREAM
from grpo_cli.train.checkpoint import read_position
from grpo_cli.train.evaluate import EVAL_STREAM
from grpo_cli.train.run_folder import list_checkpoints

TIMES = ("time/", "tokens_per_second")


IsLost = Callable[[str, int, int], bool]


class Engine:
    """Generates as the policy does, until a server would be lost: at a call that `is_lost` names.

    `is_lost` is given "update_weights" or "generate", the new version or the stream, and the version before.
    """

    def __init__(self, inner: EmbeddedEngine) -> None:
        self.inner = inner
        self.is_lost: IsLost = lambda call, what, version: False
        self.version = -1
        self.closed = 0

    def _call(self, call: str, what: int) -> None:
        if self.is_lost(call, what, self.version):
            raise ServerLost("http://10.0.0.5:8000 does not answer")

    def update_weights(self, version: int) -> int:
        self._call("update_weights", version)
        self.version = version
        return 1000

    def generate(self, prompts: Any, keys: Any, num_generations: int, *, on_group: Any = None) -> Any:
        stream = keys[0][1]

        def report(index: int, group: Any) -> None:
            if on_group is not None:
                on_group(index, group)
            self._call("generate", stream)  # when a group is finished already

        return self.inner.generate(prompts, keys, num_generations, on_group=report)

    def release_memory(self) -> None:
        self.inner.release_memory()

    def close(self) -> None:
        self.closed += 1


class Engines:
    """The engines of a test's runs, the latest last."""

    def __init__(self) -> None:
        self.made: list[Engine] = []
        self.losses: list[IsLost] = []
        """Of the next runs, one each."""

    def wrap(self, inner: Any) -> Engine:
        engine = Engine(inner)
        if self.losses:
            engine.is_lost = self.losses.pop(0)
        self.made.append(engine)
        return engine

    def train(self, recipe: dict[str, Any], **options: Any) -> Any:
        return grpo_cli.train(recipe, engine=self.wrap, **options)


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(f'{{"prompt": "held out {i}:", "answer": "{i}"}}\n' for i in range(4)))
    values: dict[str, Any] = json.loads(json.dumps(tiny_recipe))
    values["data"]["eval"] = {"name": str(held_out)}
    values["train"] |= {"eval_every": 2, "max_steps": 4, "save_every": 100}
    return values


def in_folder(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    return recipe | {"train": recipe["train"] | {"output_dir": str(folder)}}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics in the file without times."""
    return [
        {name: value for name, value in row.items() if not name.startswith(TIMES)}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same_weights(first: Any, second: Any) -> None:
    expected = second.model.state_dict()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def uninterrupted(recipe: dict[str, Any], tmp_path: Path, engines: Engines) -> Any:
    return engines.train(in_folder(recipe, tmp_path / "uninterrupted"))


# What is lost, the steps that are done then, and whether a step's evaluation is lost with it.
LOSSES: list[Any] = [
    pytest.param(lambda call, what, version: call == "update_weights" and what == 0, 0, None, id="first contact"),
    pytest.param(lambda call, what, version: call == "update_weights" and what == 1, 1, None, id="update"),
    pytest.param(
        lambda call, what, version: (call, what, version) == ("generate", 0, 0), 0, None, id="first generation"
    ),
    pytest.param(
        lambda call, what, version: (call, what, version) == ("generate", 0, 3), 3, None, id="last generation"
    ),
    pytest.param(
        lambda call, what, version: (call, what, version) == ("generate", EVAL_STREAM, 2), 2, 2, id="evaluation"
    ),
    pytest.param(
        lambda call, what, version: call == "update_weights" and what == 2, 2, 2, id="update before evaluation"
    ),
    pytest.param(
        lambda call, what, version: (call, what, version) == ("generate", EVAL_STREAM, 4),
        4,
        4,
        id="last evaluation",
    ),
]


@pytest.mark.parametrize(("is_lost", "position", "evaluation"), LOSSES)
def test_a_run_without_its_server_stops_with_a_checkpoint_and_resumes_to_the_same_weights(
    recipe: dict[str, Any],
    tmp_path: Path,
    engines: Engines,
    uninterrupted: Any,
    is_lost: Any,
    position: int,
    evaluation: int | None,
) -> None:
    folder = tmp_path / "lost"
    engines.losses = [is_lost]
    with pytest.raises(StoppedEarly) as stopped:
        engines.train(in_folder(recipe, folder))
    message = f"http://10.0.0.5:8000 does not answer\nstopped after step {position}; continue with --resume"
    assert str(stopped.value) == message
    assert isinstance(stopped.value.__cause__, ServerLost)
    (checkpoint,) = list_checkpoints(folder)
    assert read_position(checkpoint).step == position
    assert [row["step"] for row in rows(folder)] == list(range(1, position + 1))
    assert not (folder / "final").exists()
    evaluated = [row["step"] for row in rows(folder) if "eval_reward" in row]
    assert evaluated == [step for step in (2, 4) if step <= position and step != evaluation]
    assert engines.made[-1].closed == 1

    resumed = engines.train(in_folder(recipe, folder), resume=True)
    assert_same_weights(resumed, uninterrupted)
    assert rows(folder) == rows(tmp_path / "uninterrupted"), "each step is there once, with the same numbers"
    assert (folder / "final").is_dir()


def test_a_server_that_is_still_away_leaves_the_checkpoint_for_another_try(
    recipe: dict[str, Any], tmp_path: Path, engines: Engines, uninterrupted: Any
) -> None:
    folder = tmp_path / "lost"
    engines.losses = [lambda call, what, version: (call, what, version) == ("update_weights", 2, 1)] * 2
    engines.losses[1] = lambda call, what, version: True
    for resume in (False, True):
        with pytest.raises(StoppedEarly, match="stopped after step 2;"):
            engines.train(in_folder(recipe, folder), resume=resume)
    told: list[float] = []

    class Keep(grpo_cli.Callback):
        def on_evaluate(self, state: Any) -> None:
            told.append(state.metrics["eval_reward"])

    engines.train(in_folder(recipe, folder), resume=True, callbacks=[Keep()])
    assert rows(folder) == rows(tmp_path / "uninterrupted")
    assert told == [row["eval_reward"] for row in rows(folder) if "eval_reward" in row]


def test_a_server_may_be_lost_again_and_again(
    recipe: dict[str, Any], tmp_path: Path, engines: Engines, uninterrupted: Any
) -> None:
    folder = tmp_path / "lost"
    for step in range(1, 4):
        engines.losses = [lambda call, what, version, step=step: (call, what, version) == ("generate", 0, step)]
        with pytest.raises(StoppedEarly, match=f"stopped after step {step};"):
            engines.train(in_folder(recipe, folder), resume=step > 1)
    assert_same_weights(engines.train(in_folder(recipe, folder), resume=True), uninterrupted)
    assert rows(folder) == rows(tmp_path / "uninterrupted")


@pytest.mark.parametrize("lost", [("update_weights", 4), ("generate", SHOWCASE_STREAM)])
def test_a_server_lost_after_the_last_step_changes_nothing(
    recipe: dict[str, Any], tmp_path: Path, engines: Engines, uninterrupted: Any, lost: tuple[str, int]
) -> None:
    """Only the completions that are shown after training are missing."""
    recipe["logging"]["print_completions"] = 100
    del recipe["data"]["eval"], recipe["train"]["eval_every"]
    is_showing_after: IsLost = lambda call, what, version: (call, what) == lost and version in (3, 4)  # noqa: E731
    engines.losses = [is_showing_after]
    screen = Console(file=io.StringIO())
    result = engines.train(in_folder(recipe, tmp_path / "lost"), console=screen)
    assert (result.output_dir / "final").is_dir()
    assert_same_weights(result, uninterrupted)
    assert screen.file.getvalue().count("at the end of the run: http://10.0.0.5:8000 does not answer\n") == 1


def test_nothing_is_sent_for_completions_that_are_not_shown(
    recipe: dict[str, Any], tmp_path: Path, engines: Engines
) -> None:
    del recipe["data"]["eval"], recipe["train"]["eval_every"]
    sent: list[int] = []
    engines.losses = [lambda call, what, version: call == "update_weights" and bool(sent.append(what))]
    engines.train(in_folder(recipe, tmp_path / "run"))
    assert sent == [0, 0, 1, 2, 3], "at the start and before each step, and at no other time"


def test_the_bytes_that_were_sent_are_a_metric(uninterrupted: Any) -> None:
    assert [row["sync/bytes"] for row in uninterrupted.metrics] == [1000] * 4
