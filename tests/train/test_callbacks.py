"""Callbacks are found, called in order, and may stop a run or add to its metrics."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_cli.errors import RunError, StoppedEarly, UserError
from grpo_cli.recipe.load import load_recipe
from grpo_cli.train.callbacks import EVENTS, Callback, TrainState, check_callback, load_callbacks, notify


class Recorder(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, state: TrainState) -> None:
        self.steps.append(state.step)


class NeedsArguments(Callback):
    def __init__(self, value: int) -> None:
        self.value = value


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Importable as `my_callbacks`."""
    module = types.ModuleType("my_callbacks")
    monkeypatch.setitem(sys.modules, "my_callbacks", module)
    return module


@pytest.fixture
def state(tiny_recipe: dict[str, Any], tmp_path: Path) -> TrainState:
    return TrainState(load_recipe(tiny_recipe), None, None, tmp_path, 3, step=2)


def test_the_base_answers_every_event_and_does_nothing(state: TrainState) -> None:
    for event in EVENTS:
        assert callable(getattr(Callback(), event))
        notify([Callback()], event, state)
    assert not state.stop
    assert state.metrics == {}


def test_classes_are_made_and_objects_taken_as_they_are(module: Any) -> None:
    module.Recorder, module.made = Recorder, Recorder()
    first, second = load_callbacks(["my_callbacks:Recorder", "my_callbacks:made"])
    assert isinstance(first, Recorder)
    assert second is module.made


def test_what_is_no_callback_is_one_message(module: Any) -> None:
    module.Recorder, module.NeedsArguments, module.number = Recorder, NeedsArguments, 3
    for path, message in (
        ("my_callbacks:NeedsArguments", r"train\.callbacks\.1: my_callbacks:NeedsArguments\(\) failed: .*value"),
        ("my_callbacks:number", r"train\.callbacks\.1: 3 has none of the methods on_train_start"),
        ("my_callbacks:Recordr", r"train\.callbacks\.1: .*Recorder"),
        ("no_such_module:x", r"train\.callbacks\.1: .*no_such_module"),
    ):
        with pytest.raises(UserError, match=message):
            load_callbacks(["my_callbacks:Recorder", path])


def test_an_object_with_one_of_the_methods_is_a_callback(state: TrainState) -> None:
    seen: list[int] = []
    plain = types.SimpleNamespace(on_checkpoint=lambda state: seen.append(state.step))
    assert check_callback(plain, "callbacks") is plain
    notify([plain], "on_checkpoint", state)
    notify([plain], "on_step_end", state)
    assert seen == [2]


def test_callbacks_are_called_in_order_with_the_same_state(state: TrainState) -> None:
    order: list[str] = []

    def named(name: str) -> Any:
        def on_step_end(given: TrainState) -> None:
            assert given is state
            order.append(name)

        return types.SimpleNamespace(on_step_end=on_step_end)

    notify([named("a"), named("b")], "on_step_end", state)
    assert order == ["a", "b"]


def test_a_callback_may_stop_the_run_and_add_metrics_of_any_number_type(state: TrainState) -> None:
    class Adds(Callback):
        def on_step_end(self, state: TrainState) -> None:
            state.stop = True
            state.metrics["mine"] = torch.tensor(1.5)  # type: ignore[assignment]
            state.metrics["count"] = 3

    notify([Adds()], "on_step_end", state)
    assert state.stop
    assert state.metrics == {"mine": 1.5, "count": 3}
    assert type(state.metrics["mine"]) is float


@pytest.mark.parametrize("value", ["high", [1.0], None, torch.tensor([1.0, 2.0])])
def test_a_metric_that_is_no_number_names_the_callback_and_itself(state: TrainState, value: Any) -> None:
    class Adds(Callback):
        def on_step_end(self, state: TrainState) -> None:
            state.metrics["mine"] = value

    with pytest.raises(RunError, match=r"callback Adds\.on_step_end, step 2: metrics\['mine'\]"):
        notify([Adds()], "on_step_end", state)


def test_a_callback_that_fails_ends_the_run_with_its_name_and_line(state: TrainState) -> None:
    class Fails(Callback):
        def on_evaluate(self, state: TrainState) -> None:
            raise KeyError("eval_reward")

    with pytest.raises(RunError, match=r"callback Fails\.on_evaluate, step 2: .*test_callbacks\.py:\d+: KeyError"):
        notify([Fails()], "on_evaluate", state)


@pytest.mark.parametrize("error", [UserError("x"), RunError("y"), StoppedEarly("z"), KeyboardInterrupt()])
def test_errors_that_are_meant_for_the_user_pass_through(state: TrainState, error: BaseException) -> None:
    def fail(_: TrainState) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        notify([types.SimpleNamespace(on_train_end=fail)], "on_train_end", state)
    assert caught.value is error
