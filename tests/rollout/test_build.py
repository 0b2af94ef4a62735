"""The recipe's engine, and messages that name the setting which keeps it from being made."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest

from grpo_cli.distributed.ranks import Ranks
from grpo_cli.distributed.strategies.replicated import Replicated
from grpo_cli.errors import UserError
from grpo_cli.policy.logprobs import PackedModel
from grpo_cli.recipe.schema import GenerationConfig, Recipe
from grpo_cli.rollout import build as build_module
from grpo_cli.rollout.build import ENGINES, EngineParts, build_engine
from grpo_cli.rollout.embedded.engine import EmbeddedEngine
from grpo_cli.rollout.server.engine import ServerEngine
from grpo_cli.rollout.vllm import engine as vllm_engine
from tests.conftest import byte_tokenizer, tiny_llama

ALONE = Ranks()
KEY = "correct-horse-battery-staple"


def as_it_is(engine: Any) -> Any:
    return engine


@pytest.fixture
def build(tiny_recipe: dict[str, Any]) -> Any:
    """Build the engine of a recipe with these `generation` settings; return it and what the user was told."""

    def make(**generation: Any) -> tuple[Any, list[str]]:
        tiny_recipe["generation"] |= generation
        notes: list[str] = []
        recipe = Recipe.model_validate(tiny_recipe)
        policy = PackedModel.checked(tiny_llama())
        strategy = Replicated(ALONE, 1.0)

        engine = build_engine(
            EngineParts(recipe, policy, byte_tokenizer(), nullcontext, notes.append, ALONE, strategy, as_it_is)
        )
        return engine, notes

    return make


def headers_of(engine: ServerEngine) -> list[str | None]:
    return [server._http.headers.get("Authorization") for server in engine.servers]


def test_every_engine_of_the_recipe_can_be_made() -> None:
    assert set(ENGINES) == set(get_args(GenerationConfig.model_fields["engine"].annotation))


def test_by_default_the_policy_itself_generates(build: Any) -> None:
    engine, notes = build()
    assert isinstance(engine, EmbeddedEngine)
    assert notes == []


def test_vllm_in_this_process(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    class Engine:
        def __init__(self, *args: Any) -> None:
            made.append(args)

    monkeypatch.setattr(vllm_engine, "VllmEngine", Engine)
    engine, _ = build(engine="vllm", vllm={"max_model_len": 64})
    assert isinstance(engine, Engine)
    ((_, weights, _, config, eos),) = made
    assert config.vllm == {"max_model_len": 64}
    assert "lm_head.weight" in [spec.name for spec in weights.specs("float32")]
    assert eos == {256}


def test_servers_that_run_already(build: Any) -> None:
    engine, notes = build(engine="vllm_server", server={"urls": ["10.0.0.5", "https://node1:444"], "timeout_s": 7})
    assert isinstance(engine, ServerEngine)
    assert [server.url for server in engine.servers] == ["http://10.0.0.5:8000", "https://node1:444"]
    assert {server.timeout_s for server in engine.servers} == {7}
    assert headers_of(engine) == [None, None]
    assert engine.spawned is None
    assert engine.eos_token_ids == {256}
    assert notes == []
    engine.close()


def test_the_servers_key_is_read_from_its_file(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    engine, _ = build(engine="vllm_server", server={"urls": ["a", "b"], "api_key_file": "~/key"})
    assert headers_of(engine) == [f"Bearer {KEY}"] * 2
    engine.close()


@pytest.mark.parametrize(("content", "reason"), [(None, "there is no key file"), ("short", "at least 16")])
def test_a_key_file_that_cannot_be_used_is_named_with_its_setting(
    build: Any, tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
        path.chmod(0o600)
    with pytest.raises(UserError, match=rf"^generation\.server\.api_key_file: .*{reason}"):
        build(engine="vllm_server", server={"urls": ["a"], "api_key_file": str(path)})


def test_a_server_of_one_s_own_is_started_and_told_of(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Spawned:
        url, key = "http://127.0.0.1:8123", KEY

        def __init__(
            self, model: Any, tokenizer: Any, config: Any, arguments: Any, log: Path, *, training: Any
        ) -> None:
            assert list(training) == [0]
            self.config, self.arguments, self.log = config, arguments, log

        def ensure_running(self) -> None:
            started.append(self)

        def stop(self) -> None:
            started.remove(self)

    monkeypatch.setattr(build_module, "SpawnedServer", Spawned)
    engine, notes = build(engine="vllm_server", server={"spawn": True}, vllm={"max_model_len": 64})
    assert isinstance(engine, ServerEngine)
    assert [server.url for server in engine.servers] == ["http://127.0.0.1:8123"]
    assert headers_of(engine) == [f"Bearer {KEY}"]
    assert started == [engine.spawned]
    assert engine.spawned.arguments == {"max_model_len": 64}  # type: ignore[attr-defined]
    assert notes == [f"starting a rollout server; its log is {engine.spawned.log}"]  # type: ignore[union-attr]
    engine.close()
    assert started == []


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_a_model_that_vllm_cannot_be_given_is_refused_at_once(tiny_recipe: dict[str, Any], engine: str) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    tiny_recipe["generation"] |= {"engine": engine}
    if engine == "vllm_server":
        tiny_recipe["generation"]["server"] = {"urls": ["a"]}
    policy = PackedModel.checked(MixtralForCausalLM(config))
    with pytest.raises(UserError, match=r"use generation\.engine: transformers"):
        build_engine(
            EngineParts(
                Recipe.model_validate(tiny_recipe),
                policy,
                byte_tokenizer(),
                nullcontext,
                print,
                ALONE,
                Replicated(ALONE, 1.0),
                as_it_is,
            )
        )
