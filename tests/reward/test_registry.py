from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from grpo_cli.errors import UserError
from grpo_cli.recipe.schema import RewardConfig
from grpo_cli.reward import registry
from grpo_cli.reward.registry import check_columns, resolve_rewards, reward_from_callable

SOURCE = """
import functools

LIMIT = 3

def plain(prompts, completions, completion_ids):
    return [1.0 for _ in completions]

def loose(completions, target=10, **kwargs):
    return [float(target) for _ in completions]

def scaled(completions, answer, scale, power=1):
    return [scale**power * len(c) for c in completions]

async def slow(completions, factor=1, **_):
    return [factor * len(c) for c in completions]

def by_position(prompts, completions, /):
    return [0.0 for _ in completions]

def takes_nothing():
    return []

class Judge:
    def __init__(self, threshold, strict=False):
        self.threshold = threshold
        self.strict = strict

    def __call__(self, completions, answer, **_):
        return [float(len(c) > self.threshold) for c in completions]

class Broken:
    def __init__(self):
        raise RuntimeError("no licence file")

class Silent:
    pass

class AsyncJudge:
    async def __call__(self, completions, **_):
        return [1.0 for _ in completions]

judge = Judge(2)
wrapped = functools.lru_cache(loose)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's reward file in the current folder."""
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


class Entry:
    def __init__(self, name: str, module: str, attr: str) -> None:
        self.name, self.module, self.attr = name, module, attr


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        Entry("short_plain", "my_rewards", "plain"),
        Entry("short_judge", "my_rewards", "Judge"),
        Entry("twice", "my_rewards", "plain"),
        Entry("twice", "my_rewards", "loose"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if "rewards" in group else [])


def resolve(path: str, **settings: Any) -> registry.RewardFunction:
    (function,) = resolve_rewards([RewardConfig(path=path, **settings)])
    return function


def test_module_and_function_name_a_reward(module: str) -> None:
    function = resolve(f"{module}:plain", weight=2.5, timeout_s=4.0, on_error="none")
    assert (function.name, function.weight, function.timeout_s, function.on_error) == (
        "plain",
        2.5,
        4.0,
        "none",
    )
    assert function.call(prompts=["a"], completions=["b"], completion_ids=[[1]]) == [1.0]
    assert function.accepts == function.required == {"prompts", "completions", "completion_ids"}


def test_rewards_keep_the_order_of_the_recipe(module: str) -> None:
    names = ["plain", "Judge", "loose"]
    configs = [RewardConfig(path=f"{module}:{n}", params={"threshold": 1} if n == "Judge" else {}) for n in names]
    assert [function.name for function in resolve_rewards(configs)] == names


def test_a_name_of_its_own_wins_over_the_function_name(module: str) -> None:
    assert resolve(f"{module}:plain", name="mine").name == "mine"


@pytest.mark.usefixtures("installed")
def test_a_short_name_is_looked_up_among_installed_rewards(module: str) -> None:
    assert resolve("short_plain").call(prompts=[], completions=["b"], completion_ids=[]) == [1.0]
    assert resolve("short_judge", params={"threshold": 1}).call(completions=["ab"], answer=[""]) == [1.0]


@pytest.mark.usefixtures("installed")
def test_an_unknown_short_name_is_answered_with_the_nearest_and_all_installed() -> None:
    with pytest.raises(UserError) as caught:
        resolve("short_plane")
    message = str(caught.value)
    assert message.startswith("rewards.0: there is no installed reward function 'short_plane'; did you mean ")
    assert "short_plain?" in message
    assert "Installed: short_judge, short_plain, twice" in message


@pytest.mark.usefixtures("installed")
def test_a_dotted_path_without_colon_is_answered_with_the_colon() -> None:
    with pytest.raises(UserError, match=r"did you mean my_rewards:plain\?"):
        resolve("my_rewards.plain")


@pytest.mark.usefixtures("installed")
def test_a_short_name_that_two_packages_install_is_an_error() -> None:
    with pytest.raises(UserError, match="'twice' is ambiguous; write one of my_rewards:loose, my_rewards:plain"):
        resolve("twice")


def test_params_are_bound_to_a_function(module: str) -> None:
    function = resolve(f"{module}:scaled", params={"scale": 3, "power": 2})
    assert function.call(completions=["ab"], answer=["x"]) == [18]
    assert function.accepts == {"completions", "answer"}
    assert function.required == {"completions", "answer"}


def test_params_win_over_a_column_of_the_same_name(module: str) -> None:
    function = resolve(f"{module}:loose", params={"target": 7})
    assert function.accepts is None
    assert function.call(completions=["a"], target=[99]) == [7.0]


def test_params_bind_to_a_decorated_function(module: str) -> None:
    assert resolve(f"{module}:wrapped", params={"target": 4}).call(completions="a") == [4.0]


def test_a_class_is_instantiated_with_params(module: str) -> None:
    function = resolve(f"{module}:Judge", params={"threshold": 2})
    assert function.name == "Judge"
    assert function.call(completions=["ab", "abc"], answer=["", ""]) == [0.0, 1.0]
    assert function.accepts is None
    assert function.required == {"completions", "answer"}


def test_an_instance_is_called_as_it_is(module: str) -> None:
    assert resolve(f"{module}:judge").call(completions=["abc"], answer=[""]) == [1.0]


def test_an_instance_takes_no_params(module: str) -> None:
    with pytest.raises(UserError, match=r"my_rewards:judge is an object that exists already.*class Judge"):
        resolve(f"{module}:judge", params={"threshold": 1})


@pytest.mark.parametrize(("name", "taken"), [("scaled", "answer, power, scale"), ("Judge", "strict, threshold")])
def test_params_that_are_not_taken_are_named_with_those_that_are(module: str, name: str, taken: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(f"{module}:{name}", params={"scael": 1})
    assert str(caught.value) == f"rewards.0: {module}:{name} does not take scael; params can be: {taken}"


def test_params_cannot_replace_what_every_call_is_given(module: str) -> None:
    with pytest.raises(UserError, match="completions cannot be in params"):
        resolve(f"{module}:loose", params={"completions": []})


def test_an_exception_in_init_is_told_with_type_and_message(module: str) -> None:
    with pytest.raises(UserError, match="my_rewards:Broken cannot be made: RuntimeError: no licence file"):
        resolve(f"{module}:Broken")


def test_a_missing_argument_of_init_is_told(module: str) -> None:
    with pytest.raises(UserError, match=r"my_rewards:Judge cannot be made: TypeError: .*'threshold'"):
        resolve(f"{module}:Judge")


def test_a_class_without_call_is_an_error(module: str) -> None:
    with pytest.raises(UserError, match="my_rewards:Silent is a class without __call__"):
        resolve(f"{module}:Silent")


def test_what_cannot_be_called_is_an_error(module: str) -> None:
    with pytest.raises(UserError, match=r"rewards\.0: my_rewards:LIMIT is of type int, not something to call"):
        resolve(f"{module}:LIMIT")


def test_a_function_that_takes_arguments_by_position_only_is_an_error(module: str) -> None:
    with pytest.raises(UserError, match="by_position takes prompts, completions by position only"):
        resolve(f"{module}:by_position")


def test_all_errors_are_reported_at_once_and_before_a_model_is_loaded(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(registry, "_load_model", load)
    configs = [
        RewardConfig(model="some/model"),
        RewardConfig(path=f"{module}:absent"),
        RewardConfig(path=f"{module}:plain", params={"x": 1}),
        RewardConfig(model="some/other", params={"batchsize": 1}),
    ]
    with pytest.raises(UserError) as caught:
        resolve_rewards(configs)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["rewards.1", "rewards.2", "rewards.3"]
    assert "does not take batchsize; params can be: batch_size, device, dtype, max_tokens" in lines[2]


def test_models_are_left_out_when_they_are_not_to_be_loaded(module: str) -> None:
    configs = [RewardConfig(model="no/such"), RewardConfig(path=f"{module}:plain")]
    assert [function.name for function in resolve_rewards(configs, load_models=False)] == ["plain"]


def test_params_of_a_model_are_checked_even_when_it_is_not_loaded() -> None:
    with pytest.raises(UserError, match=r"rewards\.0: no/such does not take name"):
        resolve_rewards([RewardConfig(model="no/such", params={"name": "x"})], load_models=False)


def test_async_functions_and_async_call_are_recognised(module: str) -> None:
    slow = resolve(f"{module}:slow", params={"factor": 2})
    assert registry.is_async(slow.call)
    assert asyncio.run(slow.call(completions=["ab"])) == [4]
    assert registry.is_async(resolve(f"{module}:AsyncJudge").call)
    assert not registry.is_async(resolve(f"{module}:plain").call)


def test_a_python_function_becomes_a_reward_with_its_own_name() -> None:
    def mine(completions: list[str], **_: Any) -> list[float]:
        return [1.0 for _ in completions]

    function = reward_from_callable(mine)
    assert (function.name, function.weight, function.on_error, function.timeout_s) == (
        "mine",
        1.0,
        "raise",
        None,
    )
    assert reward_from_callable(mine, name="other", weight=2).weight == 2.0
    assert reward_from_callable(functools.partial(mine, extra=1)).name == "mine"


def test_a_python_object_and_a_class_become_rewards() -> None:
    class Judge:
        def __call__(self, completions: list[str]) -> list[float]:
            return [2.0 for _ in completions]

    for target in (Judge, Judge()):
        function = reward_from_callable(target)
        assert function.name == "Judge"
        assert function.accepts == {"completions"}
        assert function.call(completions=["a"]) == [2.0]


def test_a_python_object_that_cannot_be_called_or_has_no_finite_weight_is_an_error() -> None:
    with pytest.raises(UserError, match="rewards: int is of type int, not something to call"):
        reward_from_callable(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the weight of print is nan"):
        reward_from_callable(print, weight=float("nan"))


def test_missing_columns_are_required_arguments_that_nobody_gives() -> None:
    def needs(completions: list[str], truth: Any, answer: Any, hint: Any = None, **_: Any) -> list[float]:
        return []

    function = reward_from_callable(needs)
    with pytest.raises(UserError, match="needs the column answer, truth, which data does not have"):
        check_columns([function], ["question"], "data")
    check_columns([function], ["truth", "answer"], "data")
    check_columns([reward_from_callable(lambda **_: [])], [], "data")


def test_checking_rewards_imports_no_torch() -> None:
    code = "import sys, grpo_cli.reward.registry, grpo_cli.reward.scorer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
